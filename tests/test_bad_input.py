"""What users get wrong costs them one clear line, before hours are spent, and finished work is
kept.
"""

import errno
import importlib.metadata
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import typed as as_typed
from running import compose_config, key_of, store
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer

import specomp.cache
import specomp.compression.calibrate
import specomp.models.gguf
from specomp.errors import UserError
from specomp.experiment.checks import actionable
from specomp.experiment.pipeline import run
from specomp.models.save import save_compressed

FILE = "{folder}/a_file"  # not a folder
IDS = "{folder}/ids"
LOCAL = ["model=local", "model.path={folder}/model", "model.dtype=float32"]
TOKENS = ["calibration=token_ids", "calibration.path=" + IDS]


def model_folder(folder: Path) -> Path:
    """A good tiny model on disk, to be damaged."""
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def truncated(folder: Path) -> None:
    weights = model_folder(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (model_folder(folder) / "model.safetensors").write_bytes(b"not weights" * 50)


def pickled_weights(folder: Path) -> None:
    model = model_folder(folder)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (model_folder(folder) / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (model_folder(folder) / "config.json").write_text("{")


def without_tokenizer(folder: Path) -> None:
    for path in model_folder(folder).glob("tokenizer*"):
        path.unlink()


def of_type(**changes: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = model_folder(folder) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    return write


def compressed(folder: Path) -> None:
    save_compressed(
        tiny_model("llama"), tiny_tokenizer(), folder / "model", form="factors", info={}
    )


def tensor(value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file({"input_ids": value}, folder / "ids.safetensors")


def pickled_ids(folder: Path) -> None:
    (folder / "ids.pt").write_bytes(pickle.dumps({"input_ids": Path("nothing")}))


def object_ids(folder: Path) -> None:
    np.save(folder / "ids.npy", np.array([[{}]], dtype=object), allow_pickle=True)


# (what the user typed, what the line says)
TYPED: list[tuple[list[str], list[str]]] = [
    (["ratio.compression=abc"], ["ratio.compression=abc", "valid number"]),
    (["ratio.compression=1.0"], ["ratio.compression=1.0", "less than 1"]),
    (["ratio.compression=-0.1"], ["ratio.compression=-0.1", "negative"]),
    (["benchmark.window=-5"], ["window=-5", "greater than"]),
    (["ratio.compression=nan"], ["ratio.compression=nan"]),
    (["ratio.compression=null"], ["ratio.compression=null", "valid number"]),
    (["calibration.num_samples=many"], ["calibration.num_samples=many", "valid integer"]),
    (["calibration.num_samples=0"], ["calibration.num_samples=0", "greater than or equal to 1"]),
    (["calibration.num_samples=2.5"], ["calibration.num_samples=2.5", "integer"]),
    (["calibration.batch_size=0"], ["calibration.batch_size=0"]),
    (["calibration.upstream=sparse"], ["calibration.upstream=sparse", "'dense' or 'compressed'"]),
    (["calibration.corpus.split=nosuch"], ["calibration.corpus.split=nosuch", "'train' or 'test'"]),
    (["options.save=perhaps"], ["options.save=perhaps", "boolean"]),
    (["options.threads=0"], ["options.threads=0"]),
    (["seed=abc"], ["options.seed=abc"]),
    (["method.compensation.iterations=0"], ["method.compensation.iterations=0", "greater than or equal to 1"]),
    (["+method.whitening.bogus=1"], ["method.whitening.bogus=1", "Unexpected keyword argument"]),
    (["method.whitening=null"],
     ["method.whitening is a NoneType, which is no Whitening", "lacks __call__, needs"]),
    (["method.whitening._target_=specomp.methods.svd.Nope"], ["method.whitening", "Nope"]),
    (["model.dtype=fp8"], ["model.dtype=fp8", "'float32', 'bfloat16' or 'float16'"]),
    (["model.device=gpu"], ["model.device=gpu", "auto|cpu|mps|cuda"]),
    (["model.device=cuda:99"], ["model.device=cuda:99", "not on this machine", "model.device=auto"]),
    (["model.device=cpu", "model.device_map=auto"], ["model.device=cpu", "model.device_map=auto", "contradict"]),
    (["model.architecture=gpt2"], ["'gpt2' is not supported", "llama, mistral, opt, phi3"]),
    (["model.architecture=nosuch"], ["model.architecture=nosuch", "refused"]),
    (["model.config.hidden_size=33"], ["hidden size (33)", "attention heads (4)"]),
    (["model=local"], ["model.path has no default", "model.path=VALUE"]),
    (["model=local", "model.path=/nowhere"], ["Model folder /nowhere does not exist", "model.path"]),
    (["model=smollm2_135m", "model.package=no_such_package"], ["no_such_package, which is not installed", "pip install"]),
    (["model=opt_125m", "model.repo=nobody/nothing"], ["nobody/nothing", "cannot be reached", "model=local"]),
    (["calibration.length=100000"], ["100000 tokens", "context of 256", "calibration.length"]),
    (["calibration.num_samples=100000", "calibration/sampler=contiguous"], ["needs 3200000 for 100000 samples of 32", "lower calibration"]),
    (["calibration.corpus.max_documents=1", "calibration.length=250", "calibration/sampler=contiguous", "calibration.num_samples=900"],
     ["tokens, needs 225000 for 900 samples of 250"]),
    (["calibration=token_ids"], ["calibration.path has no default"]),
    (["calibration=token_ids", "calibration.path=/nowhere.pt"], ["Token file /nowhere.pt does not exist"]),
    (["calibration=token_ids", "calibration.path=/nowhere.pt", "method.whitening=null"],
     ["method.whitening is a NoneType"]),
    (["calibration=token_ids", "calibration.path=/nowhere.pt", "method/training=lora",
      "quantizer=rtn_int4"],
     ["LoRA moves numbers off the grid", "quantizer=none"]),
    (["calibration=token_ids", "calibration.path=/nowhere.pt", "method=soco",
      "method/compensation=adacomp"],
     ["AdaComp has nothing to repair"]),
    (["method=soco", "model.dtype=float16"],
     ["SpectrumTraining in bfloat16 cannot train a float16 model"]),
    (["method=soco", "calibration.upstream=compressed"],
     ["components of the dense model", "calibration.upstream=dense"]),
    (["method=soco", "ratio=bits"], ["SpectrumTraining spends parameters"]),
    (["calibration=wikitext2", "calibration.length=64", "paths.data=/nowhere"], ["/nowhere"]),
    (["calibration=wikitext2", "calibration.length=64"], ["wikitext2", "paths.data"]),
    (["benchmark=wikitext2", "benchmark.window=64", "paths.data=/nowhere"], ["/nowhere"]),
    (["benchmark=zeroshot", "paths.data=/nowhere"], ["/nowhere", "data_root=null"]),
    (["benchmark=zeroshot", "paths.data=/nowhere", "benchmark.parts.piqa.task=pika"], ["pika", "piqa"]),
    (["benchmark.window=100000"], ["windows of 100000 tokens", "context of 256", "benchmark.window"]),
    (["benchmark.window=1"], ["window=1", "greater than or equal to 2"]),
    (["benchmark.max_windows=0"], ["max_windows=0"]),
    (["ratio.compression=0.9999"], ["ratio.compression=0.9999 keeps 3 parameters", "lower ratio.compression"]),
    (["ratio.compression=0.945", "method=svd"], ["rank 0", "lower ratio.compression"]),
    (["method=svd_llm_update", "method.compensation.upstream=dense"], ["num_samples"]),
    (["method.compensation.upstream=dense", "method.compensation.stack_of_batch=off"], ["num_samples"]),
    (["trainer.accelerator=gpu"], ["trainer", "gpu"]),
    (["trainer.devices=0"], ["trainer", "devices=0"]),
    (["+trainer.bogus=1"], ["trainer", "'bogus'"]),
    (["paths.outputs=" + FILE + "/out"], ["Cannot write", "a_file/out", "paths.outputs"]),
    (["paths.cache=" + FILE + "/cache"], ["Cannot write", "a_file/cache", "paths.cache"]),
]  # fmt: skip

# (the state of files, what the user typed, what the line says)
FILES: list[tuple[Callable[[Path], None], list[str], list[str]]] = [
    (without_config, LOCAL, ["has no config.json", "save_pretrained"]),
    (broken_config, LOCAL, ["config.json cannot be used"]),
    (without_tokenizer, LOCAL, ["has no usable tokenizer", "copy the tokenizer files"]),
    (truncated, LOCAL, ["damaged or truncated", "where its header says", "download it again"]),
    (garbage, LOCAL, ["model.safetensors is damaged or truncated"]),
    (pickled_weights, LOCAL, ["only pickled weights", "pytorch_model.bin", "save_pretrained"]),
    (of_type(model_type="gpt2"), LOCAL, ["'gpt2' is not supported; supported: gemma2, llama"]),
    (of_type(model_type="bert"), LOCAL, ["'bert' is not supported; supported: gemma2, llama"]),
    (of_type(quantization_config={"quant_method": "bitsandbytes"}), LOCAL, ["is quantized (bitsandbytes)", "bfloat16 release"]),
    (of_type(num_hidden_layers=4), LOCAL, ["lacks", "weights", "incomplete"]),
    (of_type(intermediate_size=96), LOCAL, ["do not fit its config.json"]),
    (compressed, LOCAL, ["compressed already", "dense original"]),
    (tensor(torch.ones(4, 8)), [*TOKENS[:1], TOKENS[1] + ".safetensors"], ["float32 is not an integer type"]),
    (tensor(torch.ones(8, dtype=torch.int64)), [*TOKENS[:1], TOKENS[1] + ".safetensors"], ["shape (8,)", "(samples, length)"]),
    (tensor(torch.full((4, 8), 9999)), [*TOKENS[:1], TOKENS[1] + ".safetensors"], ["id 9999", "outside the vocabulary of 259"]),
    (tensor(torch.full((4, 8), -1)), [*TOKENS[:1], TOKENS[1] + ".safetensors"], ["smallest id is -1"]),
    (tensor(torch.ones(4, 8, dtype=torch.int64)), [*TOKENS[:1], TOKENS[1] + ".safetensors", "calibration.num_samples=5"],
     ["holds 4 samples of 8 tokens, 5 of 8 were asked for"]),
    (tensor(torch.ones(2, 999, dtype=torch.int64)), [*TOKENS[:1], TOKENS[1] + ".safetensors"], ["999 tokens", "context of 256"]),
    (tensor(torch.ones(2, 999, dtype=torch.int64)), ["benchmark=token_ids", f"benchmark.path={IDS}.safetensors"], ["context of 256"]),
    (tensor(torch.full((4, 8), 9999)), ["benchmark=token_ids", f"benchmark.path={IDS}.safetensors"], ["id 9999", "outside the vocabulary"]),
    (pickled_ids, [*TOKENS[:1], TOKENS[1] + ".pt"], ["pickled objects", "never loaded"]),
    (object_ids, [*TOKENS[:1], TOKENS[1] + ".npy"], ["pickled objects", "never loaded"]),
    (lambda folder: (folder / "ids.csv").write_text("1,2"), [*TOKENS[:1], TOKENS[1] + ".csv"], ["unknown suffix '.csv'"]),
]  # fmt: skip


def refused(folder: Path, *overrides: str) -> str:
    """The line that a run of these overrides ends with, before any calibration."""
    (folder / "a_file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specomp.compression.calibrate, "collect", no_calibration)
        with pytest.raises(UserError) as caught:
            run(
                compose_config(
                    folder, "options.save=false", *(x.format(folder=folder) for x in overrides)
                )
            )
    return str(caught.value)


def no_calibration(*_: object) -> None:
    raise AssertionError("calibrated before the mistake was found")


@pytest.mark.parametrize(("typed", "fragments"), TYPED, ids=[" ".join(x) for x, _ in TYPED])
def test_what_was_typed(tmp_path, typed, fragments):
    check_line(refused(tmp_path, *typed), fragments)


@pytest.mark.parametrize(
    ("prepare", "typed", "fragments"),
    FILES,
    ids=[f"{i}-{x[2][0][:30]}" for i, x in enumerate(FILES)],
)
def test_state_of_files(tmp_path, prepare, typed, fragments):
    prepare(tmp_path)
    check_line(refused(tmp_path, *typed), fragments)


def check_line(line: str, fragments: list[str]) -> None:
    assert "\n" not in line and len(line) < 500, line
    for fragment in fragments:
        assert fragment in line, line


# ---- what no user typed


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-40], lambda data: b"x" * len(data), lambda data: data[:-4] + b"\0\0\0\1"],
)
@pytest.mark.parametrize("kind", ["statistics", "spectra"])
def test_damaged_cache_is_recomputed_and_said(tmp_path, caplog, kind, damage):
    """Truncated and garbage files, and one wrong bit at the end; the numbers come out as before."""
    expected = run(compose_config(tmp_path, "method=svd_llm", "options.save=false"))
    part = sorted((tmp_path / "cache" / kind).rglob("*.safetensors"))[0]
    part.write_bytes(damage(part.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert (
            run(
                compose_config(
                    tmp_path, "method=svd_llm", "options.save=false", "options.redo=true"
                )
            )
            == expected
        )
    assert "is damaged" in caplog.text and part.name in caplog.text


def test_statistics_are_never_taken_from_a_half_compressed_model(tmp_path):
    """One wrong bit in the last decoder layer's Gram is seen only when the ones before are
    compressed: stop, and do it anew next time.
    """
    cfg = compose_config(tmp_path, "method=svd_llm", "options.save=false")
    expected = run(cfg)
    part = sorted((tmp_path / "cache" / "statistics").rglob("*.safetensors"))[-1]
    part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\1")
    again = ["method=svd_llm", "options.save=false", "options.redo=true"]
    with pytest.raises(
        UserError, match="lost the statistics of decoder layer 2 .* run the same command again"
    ):
        run(compose_config(tmp_path, *again))
    assert run(compose_config(tmp_path, *again)) == expected


def test_damaged_converted_model_is_converted_again(tmp_path, monkeypatch, caplog):
    package = tmp_path / "packed_model"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "v1")
    monkeypatch.setattr(
        specomp.models.gguf,
        "convert",
        lambda _, target, *, off_grid: model_folder(target.parent).rename(target),
    )
    typed = [
        "model=smollm2_135m",
        "model.package=packed_model",
        "model.version=v1",
        "model.filename=model.gguf",
        "model.shape=null",
        "options.save=false",
    ]
    expected = run(compose_config(tmp_path, *typed))
    weights = next((tmp_path / "cache" / "models").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert run(compose_config(tmp_path, *typed, "options.redo=true")) == expected
    assert "is damaged" in caplog.text and "making it again" in caplog.text


def test_damaged_compressed_model_is_made_again(tmp_path, caplog):
    cfg = compose_config(tmp_path)
    expected = run(cfg)
    weights = next((tmp_path / "outputs" / "models").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert run(compose_config(tmp_path)) == expected
    assert "damaged or truncated" in caplog.text and "Compressing again" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 99}', ""])
def test_damaged_record_is_made_again(tmp_path, caplog, content):
    cfg = compose_config(tmp_path, "options.save=false")
    expected = run(cfg)
    store(tmp_path).path(key_of(cfg)).write_text(content)
    with caplog.at_level(logging.WARNING):
        assert run(compose_config(tmp_path, "options.save=false")) == expected
    assert "is not a readable record" in caplog.text and "made again" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded")],
)
def test_disk_full_while_the_cache_is_written(tmp_path, monkeypatch, error):
    """Nothing half-written stays, and once there is room the same command finishes."""
    cfg = compose_config(tmp_path, "options.save=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specomp.cache, "save_file", raiser(error))
        with pytest.raises(UserError) as caught:
            run(cfg)
    check_line(str(caught.value), ["No space left", "MiB free", "paths.cache"])
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not list(
        tmp_path.rglob(".*.tmp")
    )
    record = store(tmp_path).load(key_of(cfg))
    assert record is not None and record.status == "failed" and "No space left" in str(record.error)
    assert run(cfg) is not None


def test_disk_full_while_the_model_is_saved(tmp_path, monkeypatch):
    cfg = compose_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.modeling_utils.safe_save_file",
            raiser(OSError(errno.ENOSPC, "No space left on device")),
        )
        with pytest.raises(UserError) as caught:
            run(cfg)
    check_line(str(caught.value), ["No space left", "paths.outputs"])
    assert not any((tmp_path / "outputs" / "models").iterdir())
    assert run(cfg) is not None


def test_disk_full_while_the_record_is_written(tmp_path):
    write = Path.write_text

    def full(path: Path, *args: object, **options: object) -> int:
        if "records" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError) as caught:
            run(compose_config(tmp_path, "options.save=false"))
    check_line(str(caught.value), ["No space left", "records"])
    assert not list((tmp_path / "outputs" / "records").glob(".*.tmp"))


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(error):
    check_line(
        str(actionable(error)),
        ["Out of memory", "calibration.batch_size", "calibration.layers_at_once"],
    )


def test_refused_run_keeps_what_is_finished(tmp_path):
    """A bad benchmark on top of a finished record changes nothing of it."""
    cfg = compose_config(tmp_path)
    run(cfg)
    path = store(tmp_path).path(key_of(cfg))
    before = path.read_bytes()
    refused(tmp_path, "benchmark.window=100000")
    assert path.read_bytes() == before


def test_failed_record_is_not_retried_when_told_so(tmp_path):
    typed = ["options.save=false", "method=svd", "ratio.compression=0.945"]
    refused(tmp_path, *typed)
    check_line(
        refused(tmp_path, *typed, "options.retry=false"),
        ["failed before", "rank 0", "options.retry=false"],
    )


@pytest.mark.parametrize("typed", [["ratio=dense", "method=svd"], ["ratio.compression=0"]])
def test_nothing_removed_is_the_dense_model(tmp_path, typed):
    """Allowed: the end point of a sweep over ratios. Every linear stays dense."""
    cfg = compose_config(tmp_path, "options.save=false", *typed)
    run(cfg)
    record = store(tmp_path).load(key_of(cfg))
    assert record is not None and record.counted.num_dense == record.counted.num_linears
    assert record.metrics == record.dense_metrics


# ---- the command line itself


# Hydra's own words for keys and choices it does not know; nothing is imported yet, so these are
# quick.
HYDRA: list[tuple[list[str], list[str]]] = [
    (["sead=1"], ["has no setting sead; did you mean seed?"]),
    (["ratio.compresion=0.1"], ["ratio has no setting compresion; did you mean compression?"]),
    (["method=nosuch"], ["specomp: method has no choice nosuch: there are adasvd, ", "svd_llm"]),
    (
        ["ratio=cr30,nosuch", "-m"],
        ["specomp: ratio has no choice nosuch: there are bits, ", "cr40"],
    ),
    (["foo"], ["Error parsing override 'foo'"]),
]


@pytest.mark.parametrize(("typed", "fragments"), HYDRA, ids=[" ".join(x) for x, _ in HYDRA])
def test_command_with_unknown_names(tmp_path, typed, fragments):
    done = as_typed(tmp_path, "debug=tiny", *typed)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("ratio=0.4", "A number is written ratio.compression=0.4."),
        ("ratio=20", "A number is written ratio.compression=0.2."),
        ("ratio=cr20,1.5", "ratio is chosen by name: bits, bits2, bits3"),
        ("method=null", "method is chosen by name: adasvd"),
        ("method/training=1", "method/training is chosen by name: lora"),
    ],
)
def test_a_number_where_a_name_belongs(tmp_path, typed, said):
    """Hydra itself ends in 25 lines of traceback."""
    done = as_typed(tmp_path, "debug=tiny", typed)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_command_ends_in_one_line(tmp_path):
    done = as_typed(tmp_path, "debug=tiny", "ratio.compression=abc")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()  # neither Hydra's announcement nor its hint
    assert line.startswith("specomp: ratio.compression=abc: ")


def test_command_goes_on_after_a_failed_job(tmp_path):
    """A sweep does its other jobs, says at once what failed, and ends with a non-zero status."""
    done = as_typed(
        tmp_path,
        "debug=tiny",
        "method=svd",
        "options.save=false",
        "ratio.compression=0.9999,0.5",
        "-m",
    )
    assert done.returncode == 1
    assert (
        "Traceback" not in done.stderr and "specomp: ratio.compression=0.9999 keeps" in done.stderr
    )
    assert (
        "specomp: ratio.compression=0.9999 keeps" in done.stdout
    )  # the log, in the order of events
    records = store(tmp_path).all()
    assert sorted((x.choices["method"], x.status) for x in records) == [
        ("dense", "ok"),
        ("svd", "failed"),
        ("svd", "ok"),
    ]
