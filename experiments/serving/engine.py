"""The side of vLLM: runs where vLLM is installed and specomp is not.

    python engine.py tokens JOB OUT     greedy tokens of one folder
    python engine.py speed JOB OUT      seconds of prefill and decode of several, turn by turn

compare.py and speed.py start it.
"""

import json
import sys
import time
from pathlib import Path

OWN = {"model_impl": "transformers", "trust_remote_code": True}  # of a folder of ours


def engine(folder, dtype, length, own, eager=True, **options):
    """Of a folder; own: by vLLM's transformers backend; eager: without torch.compile."""
    from vllm import LLM

    return LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=eager,
        enable_prefix_caching=False,
        max_model_len=length,
        dtype=dtype,
        seed=0,
        disable_log_stats=True,
        **(OWN if own else {}),
        **options,
    )


def generated(model, prompts, count):
    """`count` greedy tokens after each prompt of token ids."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    out = model.generate([{"prompt_token_ids": x} for x in prompts], greedy, use_tqdm=False)
    return [list(x.outputs[0].token_ids) for x in out]


def tokens(job):
    """Of one folder, by the backend that it needs."""
    size = job["tensor_parallel"]
    model = engine(job["folder"], job["dtype"], job["length"], own=True, tensor_parallel_size=size)
    return generated(model, job["prompts"], job["count"])


def speed(job):
    """[name, batch, seconds of prefill, seconds of prefill and decode] of every folder and round:
    all engines are up, and take turns.
    """
    models = {
        name: engine(
            *(folder, job["dtype"], job["length"], own, job["eager"]),
            max_num_seqs=max(job["batches"]),
        )
        for name, (folder, own) in job["folders"].items()
    }
    found = []
    for batch in job["batches"]:
        prompts = [[7 + (3 * i + j) % 900 for j in range(job["prompt"])] for i in range(batch)]
        for turn in range(-1, job["rounds"]):  # the first is to warm up
            for name, model in models.items():
                seconds = []
                for count in (1, job["new"] + 1):
                    start = time.perf_counter()
                    generated(model, prompts, count)
                    seconds.append(time.perf_counter() - start)
                if turn >= 0:
                    found.append([name, batch, *seconds])
    return found


if __name__ == "__main__":
    what, given, out = sys.argv[1:]
    job = json.loads(Path(given).read_text())
    Path(out).write_text(json.dumps({"tokens": tokens, "speed": speed}[what](job)))
