"""Checkpoints that are broken on purpose, a seeded stream of them, each put through the loader of its format.

Run as a program (`python -m tests.support.mutations SEED COUNT DIRECTORY`), because its audit hook can never be taken off
again and because a loader that crashes should not take the tests along. Prints a report as JSON.
"""

import json
import os
import pickle
import random
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.support.small_tokenizer import sentencepiece_model
from bench.support.synthetic_llama import SyntheticLlama, twin
from model_parallel.checkpoint.detect import describe
from model_parallel.errors import CheckpointError
from tests.support.shards import load_parts

FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "shutil.rmtree", "os.remove", "os.rename", "os.mkdir", "os.symlink")  # fmt: skip
Mutation = Callable[[Path, random.Random], None]


class Watch:
    """Notes what loading code must never do."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes or event.startswith(FORBIDDEN):
            self.events.append(f"{event} {arguments!r:.200}")


class Evil:
    """Unpickled, it calls what it was given."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def tiny() -> SyntheticLlama:
    return replace(twin("7b"), dim=32, n_heads=4, n_kv_heads=4, n_layers=1, ffn=96, multiple_of=16, num_files=2)


def write_bases(root: Path) -> dict[str, Path]:
    """One small checkpoint of each kind that is loaded."""
    model = tiny()
    bases = {
        "safetensors": model.write(root / "safetensors", "hf"),
        "sharded": model.write(root / "sharded", "hf"),
        "bin": model.write(root / "bin", "hf"),
        "meta": model.write(root / "meta", "meta"),
        "gguf": root / "gguf",
    }
    tensors = {name: weight.half() for name, weight in model.hugging_face()}
    for name in ("safetensors", "bin"):
        for file in bases[name].glob("model*"):
            file.unlink()
    save_file(tensors, bases["safetensors"] / "model.safetensors")
    torch.save(tensors, bases["bin"] / "pytorch_model.bin")
    bases["gguf"].mkdir()
    write_gguf(model, bases["gguf"] / "model.gguf")
    return bases


def write_gguf(model: SyntheticLlama, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "block_count": model.n_layers, "context_length": 64, "embedding_length": model.dim,
        "feed_forward_length": model.ffn, "attention.head_count": model.n_heads,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    names = {"attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
             "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
             "feed_forward.w3": "ffn_up"}  # fmt: skip
    tables = {"tok_embeddings": "token_embd", "norm": "output_norm"}
    for name in model.shapes():
        stem = name.removesuffix(".weight")
        _, _, part = stem.partition("layers.0.")
        theirs = f"blk.0.{names.get(part, part)}" if part else tables.get(stem, stem)
        writer.add_tensor(f"{theirs}.weight", model.tensor(name).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def source(directory: Path) -> Path:
    """What the loader is given: the directory, or the GGUF file in it."""
    return directory / "model.gguf" if directory.name.endswith("gguf") else directory


def weight_file(directory: Path, draw: random.Random) -> Path:
    kinds = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
    return draw.choice(sorted(p for kind in kinds for p in directory.glob(kind)))


# ---- what is done to them: each must be refused ----


def truncate(directory: Path, draw: random.Random) -> None:
    file = weight_file(directory, draw)
    os.truncate(file, draw.randrange(file.stat().st_size))


def remove_file(directory: Path, draw: random.Random) -> None:
    weight_file(directory, draw).unlink()


def loop(directory: Path, draw: random.Random) -> None:
    file = weight_file(directory, draw)
    file.unlink()
    file.symlink_to(file.name)


def noise(directory: Path, draw: random.Random) -> None:
    file = weight_file(directory, draw)
    file.write_bytes(draw.randbytes(draw.randrange(1, 4096)))


def settings(directory: Path, draw: random.Random) -> None:
    """A size in the configuration that the tensors do not have, or that is no size."""
    file = next(f for name in ("config.json", "params.json") if (f := directory / name).exists())
    values = json.loads(file.read_text())
    sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "dim", "n_layers"} & values.keys()
    wrong = [
        -1,
        0,
        3,
        10**12,
        1 << 31,
        "32",
        [32],
        {},
        True,
        1e400,
        values["hidden_size" if "dim" not in values else "dim"] * 2,
    ]
    key = draw.choice(sorted(sizes))
    if key == "vocab_size" and "dim" in values:
        wrong.remove(-1)
    values[key] = draw.choice(wrong)
    file.write_text(json.dumps(values))


def broken_settings(directory: Path, draw: random.Random) -> None:
    file = draw.choice([f for f in (directory / "config.json", directory / "params.json") if f.exists()])
    data = file.read_bytes()
    file.write_bytes(draw.choice([data[: draw.randrange(len(data))], b"[" * 10**5, b"[]", b"\xff" + data, b""]))


def index(directory: Path, draw: random.Random) -> None:
    file = directory / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    name = draw.choice(sorted(values["weight_map"]))
    others = [f for f in ("model-00001.safetensors", "model-00002.safetensors") if f != values["weight_map"][name]]
    bad = ["../x.safetensors", "", ".", "/etc/passwd", "a\0b.safetensors", "gone.safetensors", 7, None, *others]
    values["weight_map"][draw.choice([name, "ghost"])] = draw.choice(bad)
    file.write_text(json.dumps(values))


def safetensors_header(directory: Path, draw: random.Random) -> None:
    """One field of the header: offsets that overlap, leave holes or leave the file, another type, another shape or name."""
    file = weight_file(directory, draw)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    name, other = draw.sample(names, 2)
    entry = header[name]
    start, stop = entry["data_offsets"]
    shifts = [[start + 2, stop + 2], [start - 2, stop - 2], [stop, start], [0, 1 << 62], [-2, stop], [start, stop + 2]]
    change: Callable[[], object] = draw.choice([
        lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        lambda: entry.update(data_offsets=draw.choice(shifts)),
        lambda: entry.update(dtype=draw.choice(["F32", "F64", "I32", "BOOL", "F8_E4M3", "I16", "U16", "nonsense", 3, None])),
        lambda: entry.update(shape=draw.choice([[], [1], [*entry["shape"], 2], [*entry["shape"][:-1], 1 << 60], [-1], "x",
                                                [1 << 33, 1 << 31], [0, *entry["shape"]]])),
        lambda: header.pop(name),
        lambda: header.update({f"x{name}": header.pop(name)}),
        lambda: header.update(extra={"dtype": "F16", "shape": [0], "data_offsets": [len(body), len(body)]}),
        lambda: entry.pop(draw.choice(["dtype", "shape", "data_offsets"])),
    ])  # fmt: skip
    change()
    text = json.dumps(header).encode()
    told = draw.choice([len(text)] * 6 + [len(text) - 1, len(text) + len(body) + 1, 1 << 63, (1 << 64) - 1])
    file.write_bytes(told.to_bytes(8, "little") + text + body)


def sharded_header(directory: Path, draw: random.Random) -> None:
    """The same where an index says which tensors count: one that it does not name may be anything, and is not read."""
    safetensors_header(directory, draw)


def torch_tensors(directory: Path, draw: random.Random) -> None:
    """One entry of a torch file that is missing, left over, or something else than a plain array of floats."""
    file = weight_file(directory, draw)
    content: dict[Any, Any] = torch.load(file, weights_only=True)
    name = draw.choice(sorted(n for n in content if n != "rope.freqs"))
    tensor = content[name]
    changes: list[Callable[[], object]] = [
        lambda: content.pop(name),
        lambda: content.update({f"x.{name}": content.pop(name)}),
        lambda: content.update({7: tensor}),
        lambda: content.update({name: draw.choice([3, "x", None, [tensor], {"a": tensor}])}),
        lambda: content.update({name: tensor.to(draw.choice([torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]))}),
        lambda: content.update({name: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)}),
        lambda: content.update({name: torch.zeros(1, dtype=tensor.dtype).expand(1 << 50)}),
        lambda: content.update({name: tensor.to_sparse()}),
        lambda: content.update({name: tensor.to("meta")}),
        lambda: content.update({name: tensor[:-1].clone()}),
        lambda: content.update({name: tensor.unsqueeze(0)}),
        lambda: content.update({name: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)}),
    ]  # fmt: skip
    draw.choice(changes)()
    if draw.random() < 0.05:
        content = draw.choice([[content], tensor, (content,)])
    torch.save(content, file)


def code(directory: Path, draw: random.Random) -> None:
    """A pickle that would run something."""
    file = weight_file(directory, draw)
    canary = str(directory / "canary")
    evil = draw.choice([
        Evil(os.system, f"touch {canary}"), Evil(eval, f"open({canary!r}, 'w')"), Evil(open, canary, "w"),
        Evil(exec, f"open({canary!r}, 'w')"), Evil(os.mkdir, canary), Evil(shutil.rmtree, str(directory)),
        Evil(getattr, "x", "upper"), Evil(torch.load, str(file)), Evil(torch.hub.load, "a/b", "c"), Evil(Path, canary),
        Evil(pickle.loads, b"cos\nsystem\n(S'true'\ntR."), Evil(np.load, canary), Evil(torch.jit.load, canary),
    ])  # fmt: skip
    content = torch.load(file, weights_only=True)
    content[draw.choice(["x", *sorted(content)])] = evil
    torch.save(content, file, _use_new_zipfile_serialization=draw.random() < 0.7)


def archive(directory: Path, draw: random.Random) -> None:
    """The zip itself: compressed members, missing members, two of a name."""
    file = weight_file(directory, draw)
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    how = draw.randrange(3)
    lost = draw.choice([name for name in members if "/data" in name and ".data" not in name]) if how == 1 else ""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if how == 0 else zipfile.ZIP_STORED) as new:
        for name, data in members.items():
            if name != lost:
                new.writestr(name, data)
        if how == 2:
            new.writestr(name.replace("version", "data.pkl"), b"\x80\x02}.")
            new.writestr(name.replace("version", "data.pkl"), b"\x80\x02}.")


def extra_file(directory: Path, draw: random.Random) -> None:
    """A third part of a model of two, or a gap in their numbers."""
    shutil.copy(
        directory / "consolidated.00.pth", directory / draw.choice(["consolidated.02.pth", "consolidated.07.pth"])
    )


def other_norm(directory: Path, draw: random.Random) -> None:
    """Files of two different models."""
    file = directory / "consolidated.01.pth"
    content = torch.load(file, weights_only=True)
    content[draw.choice(["norm.weight", "layers.0.ffn_norm.weight"])][draw.randrange(32)] += 1
    torch.save(content, file)


def pieces(directory: Path, draw: random.Random) -> None:
    """A tokenizer that is cut off or is not one, where the vocabulary's size is counted from it."""
    data = sentencepiece_model()
    bad = [data[: draw.randrange(2, 4000)], b"", b"\x0a", b"\xff" * 100, b"\x08" * 1000, b"not a model"]
    (directory / "tokenizer.model").write_bytes(draw.choice(bad))


# ---- one byte of a header: refused, or the very same weights ----


def header_byte(directory: Path, draw: random.Random) -> None:
    file = weight_file(directory, draw)
    data = bytearray(file.read_bytes())
    position = draw.choice(header_positions(file, data))
    data[position] ^= draw.randrange(1, 256)
    file.write_bytes(data)


def header_positions(file: Path, data: bytearray) -> range:
    if file.suffix == ".safetensors":
        return range(8 + int.from_bytes(data[:8], "little"))
    with zipfile.ZipFile(file) as old:
        spans = [range(old.start_dir, len(data))]
        for member in old.infolist():
            end = (
                member.header_offset
                + 30
                + len(member.filename)
                + (member.file_size if member.filename.endswith("pkl") else 0)
            )
            spans.append(range(member.header_offset, end))
    return random.Random(len(data)).choice(spans)


def gguf_byte(directory: Path, draw: random.Random) -> None:
    """One byte of a name, a size, a type or an offset in the table of tensors."""
    file = directory / "model.gguf"
    data = bytearray(file.read_bytes())
    table = data.index(b"token_embd.weight") - 8
    data[draw.randrange(table, min(t.data_offset for t in gguf.GGUFReader(file).tensors) - 31)] ^= draw.randrange(
        1, 256
    )
    file.write_bytes(data)


COMMON = [truncate, remove_file, loop, noise]
DIRECTORIES = [*COMMON, settings, broken_settings]
MUTATIONS: dict[str, list[Mutation]] = {
    "safetensors": [*DIRECTORIES, safetensors_header, safetensors_header, header_byte],
    "sharded": [*DIRECTORIES, sharded_header, index, index],
    "bin": [*DIRECTORIES, torch_tensors, torch_tensors, code, code, archive, header_byte],
    "meta": [
        *DIRECTORIES,
        torch_tensors,
        torch_tensors,
        code,
        code,
        archive,
        extra_file,
        other_norm,
        pieces,
        header_byte,
    ],
    "gguf": [truncate, loop, noise, gguf_byte, gguf_byte],
}
MAY_CHANGE_NOTHING = (header_byte, sharded_header)
MAY_BE_HARMLESS = (*MAY_CHANGE_NOTHING, gguf_byte)


def same(parts: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    return parts.keys() == whole.keys() and all(torch.equal(tensor, whole[name]) for name, tensor in parts.items())


def run(seed: int, count: int, root: Path) -> dict[str, Any]:
    draw = random.Random(seed)
    bases = write_bases(root / "bases")
    whole = {kind: load_parts(describe(source(path))) for kind, path in bases.items()}
    watch = Watch()
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest_s = 0.0
    for number in range(count):
        kind = draw.choice(sorted(bases))
        mutate = draw.choice(MUTATIONS[kind])
        directory = root / f"{number}-{kind}"
        shutil.copytree(bases[kind], directory)
        mutate(directory, draw)
        case = f"{number} {kind} {mutate.__name__}"
        watch.on, began_s = True, time.perf_counter()
        try:
            # What may change nothing is told by the whole weights; else the loader is one of two ranks.
            num_ranks = 1 if mutate in MAY_CHANGE_NOTHING else 2
            parts = load_parts(describe(source(directory)), num_ranks, draw.randrange(num_ranks))
        except CheckpointError as error:
            outcomes["refused"] += 1
            if str(directory) not in str(error):
                wrong.append(f"{case}: the error names no file: {error}")
        except Exception as error:
            wrong.append(f"{case}: {type(error).__name__}: {error!s:.300}")
        else:
            outcomes["harmless"] += 1
            if mutate not in MAY_BE_HARMLESS or (mutate in MAY_CHANGE_NOTHING and not same(parts, whole[kind])):
                wrong.append(f"{case}: was loaded")
        watch.on = False
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
        if (directory / "canary").exists():
            wrong.append(f"{case}: code was run")
        shutil.rmtree(directory)
    return {"cases": count, **outcomes, "slowest_s": slowest_s, "wrong": wrong, "events": watch.events}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
