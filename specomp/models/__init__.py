"""Language models: where their linears are (family, families), how they are loaded (load, sources,
gguf) and saved (export).
"""
