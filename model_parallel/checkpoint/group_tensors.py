"""Quantised weights of Hugging Face checkpoints, read into one form: AWQ, GPTQ, compressed-tensors.

Shape suffixes: O outputs · I inputs · P inputs of whole groups · S, G groups
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from model_parallel.checkpoint.group_settings import GroupSettings
from model_parallel.checkpoint.stored import StoredTensor
from model_parallel.errors import CheckpointError
from model_parallel.kernels.interface import GroupMatrix
from model_parallel.model.partition import Shard
from model_parallel.weight_format import GroupFormat

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word, in fours of bits, each of eight neighbouring outputs is."""
_PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "awq": (("qweight", "qzeros", "scales"), ()),
    "gptq": (("qweight", "qzeros", "scales"), ("g_idx",)),
    "compressed-tensors": (
        ("weight_packed", "weight_scale"),
        ("weight_zero_point", "weight_shape", "weight_g_idx"),
    ),
}
_SCALE_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class GroupedLinear:
    """One quantised matrix of a checkpoint, as tensors of mapped files."""

    def __init__(self, name: str, settings: GroupSettings, parts: Mapping[str, StoredTensor]) -> None:
        """parts: by the last part of the tensor's name. Raises CheckpointError when one is missing or of a wrong shape."""
        self.name = name
        self.settings = settings
        self._stored = parts
        needed = _PARTS[settings.method][0]
        for part in needed:
            if part not in parts:
                raise CheckpointError(f"{self.file}: {self._module} lacks {part}, which {settings.method} needs")
        self._parts: dict[str, Tensor] = {}
        for part, stored in parts.items():
            if stored.mapped is None:
                raise CheckpointError(
                    f"{stored.file}: {self._module}.{part} is of type {stored.type}, which cannot be read"
                )
            self._parts[part] = stored.mapped
        self.shape = self._shape()
        self._check_shapes()
        self.symmetric_zero = settings.symmetric and self._zero_is_middle()

    @property
    def file(self) -> str:
        return str(next(iter(self._stored.values())).file)

    @property
    def _module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def _scales(self) -> Tensor:
        """[S, O] of AWQ and GPTQ, [O, S] of compressed-tensors."""
        return self._parts["weight_scale" if self.settings.method == "compressed-tensors" else "scales"]

    @property
    def format(self) -> GroupFormat:
        scale_type = _SCALE_TYPES.get(self._scales.dtype)
        if scale_type is None:
            raise CheckpointError(
                f"{self.file}: the scales of {self._module} are {self._scales.dtype}; 16 or 32 bits are read"
            )
        settings = replace(self.settings, symmetric=self.symmetric_zero)
        return settings.group_format(scale_type)  # type: ignore[arg-type]

    def _shape(self) -> tuple[int, int]:
        per_word = 32 // self.settings.bits
        match self.settings.method:
            case "awq":
                num_inputs, words = self._parts["qweight"].shape
                return words * per_word, num_inputs
            case "gptq":
                words, num_outputs = self._parts["qweight"].shape
                return num_outputs, words * per_word
            case "compressed-tensors":
                if "weight_shape" in self._parts:
                    num_outputs, num_inputs = self._parts["weight_shape"].flatten().tolist()
                    return int(num_outputs), int(num_inputs)
                num_outputs, words = self._parts["weight_packed"].shape
                return num_outputs, words * per_word

    def _num_scales(self) -> int:
        """Groups along the inputs, as stored."""
        size = self.settings.group_size
        return 1 if size == -1 else -(-self.shape[1] // size)

    def _check_shapes(self) -> None:
        num_outputs, num_inputs = self.shape
        per_word, groups = 32 // self.settings.bits, self._num_scales()
        words, output_words = -(-num_inputs // per_word), -(-num_outputs // per_word)
        expected: dict[str, tuple[int, ...]]
        match self.settings.method:
            case "awq":
                expected = {"qweight": (num_inputs, output_words), "qzeros": (groups, output_words)}
            case "gptq":
                expected = {"qweight": (words, num_outputs), "qzeros": (groups, output_words), "g_idx": (num_inputs,)}
            case "compressed-tensors":
                expected = {"weight_packed": (num_outputs, words), "weight_zero_point": (output_words, groups)}
                expected |= {"weight_scale": (num_outputs, groups), "weight_g_idx": (num_inputs,)}
        if self.settings.method != "compressed-tensors":
            expected["scales"] = (groups, num_outputs)
        elif not self.settings.symmetric and "weight_zero_point" not in self._parts:
            raise CheckpointError(f"{self.file}: {self._module} lacks weight_zero_point, and symmetric is false")
        for part, shape in expected.items():
            tensor = self._parts.get(part)
            if tensor is None:
                continue
            given = tuple(tensor.shape)
            if given != shape and not (part == "weight_scale" and tensor.numel() == num_outputs * groups):
                raise CheckpointError(
                    f"{self.file}: {self._module}.{part} has shape {list(given)}; group_size {self.settings.group_size} and "
                    f"{self.settings.bits} bits need {list(shape)}"
                )
            if not part.endswith(("scales", "weight_scale")) and tensor.dtype not in (torch.int32, torch.int64):
                raise CheckpointError(f"{self.file}: {self._module}.{part} is {tensor.dtype}; int32 is needed")

    def _zero_is_middle(self) -> bool:
        """Whether a symmetric GPTQ matrix has the zeros that this means. Some files say one version and follow the other."""
        if self.settings.method != "gptq":
            return True
        bits, middle = self.settings.bits, 1 << self.settings.bits - 1
        zeros = _unpacked(self._parts["qzeros"], bits).flatten()
        low, high = int(zeros.min()), int(zeros.max())
        return low == high and low in (middle - 1, middle)

    @cached_property
    def order_I(self) -> Tensor | None:
        """int64: inputs sorted by their groups; None where they already are. The files tell, whatever desc_act or actorder says.
        Raises CheckpointError."""
        index = self._parts.get("g_idx", self._parts.get("weight_g_idx"))
        if index is None:
            return None
        size = self.shape[1] if self.settings.group_size == -1 else self.settings.group_size
        natural = torch.arange(self.shape[1]) // size
        if torch.equal(index.long(), natural):
            return None
        order_I = torch.argsort(index.long(), stable=True)
        if not torch.equal(index.long()[order_I], natural):
            raise CheckpointError(f"{self.file}: {self._module}.g_idx does not give each group {size} inputs")
        return order_I

    def read(self, shard: Shard) -> GroupMatrix:
        """A rank's part. Raises CheckpointError where reordered inputs would have to be cut."""
        num_inputs = self.shape[1]
        outputs, inputs = range(self.shape[0]), range(num_inputs)
        if shard.axis == 0:
            outputs = range(shard.start, shard.stop)
        elif shard.axis == 1:
            inputs = range(shard.start, shard.stop)
        form, order_I = self.format, self.order_I
        if order_I is not None and inputs != range(num_inputs):
            raise CheckpointError(
                f"{self.file}: {self.name} has its inputs in groups of {self.settings.group_size} in an order of its own "
                "(desc_act), so they cannot be cut as they are; set quantization to none or tensor_parallel_size to 1, or serve "
                "a checkpoint without desc_act"
            )
        spans = form.spans(inputs.start, inputs.stop)
        start, stop = spans.start * form.group_size, spans.stop * form.group_size
        values_OP = self._values(outputs, start, min(stop, num_inputs), order_I)
        values_OP = torch.nn.functional.pad(values_OP, (0, stop - start - values_OP.shape[1]))
        pairs = values_OP[:, 0::2] | values_OP[:, 1::2] << 4
        values_OB = pairs if form.bits == 4 else (values_OP ^ 0x80).view(torch.int8)
        # Which of the file's groups each kept group is of.
        size = num_inputs if self.settings.group_size == -1 else self.settings.group_size
        groups_S = torch.arange(start, stop, form.group_size).clamp_(max=num_inputs - 1) // size
        order_P = None
        if order_I is not None:
            order_P = torch.nn.functional.pad(order_I.int(), (0, stop - num_inputs), value=-1)
        return GroupMatrix(
            format=form,
            num_inputs=len(inputs),
            num_before=0 if order_P is not None else inputs.start - start,
            order_P=order_P,
            values_OB=values_OB,
            scales_OS=self._output_groups(self._scales, outputs, groups_S),
            zeros_OS=None if form.kind == "fixed_zero" else self._zeros(outputs, groups_S),
        )

    def _values(self, outputs: range, start: int, stop: int, order_I: Tensor | None) -> Tensor:
        """uint8 [O, P], from input `start` to `stop` in the groups' order."""
        bits, per_word = self.settings.bits, 32 // self.settings.bits
        rows = slice(outputs.start, outputs.stop)
        if self.settings.method == "awq":
            words = slice(outputs.start // per_word, -(-outputs.stop // per_word))
            packed = self._parts["qweight"][start:stop, words]
            values_IO = _unpacked_awq(packed)[:, outputs.start - words.start * per_word :][:, : len(outputs)]
            return values_IO.t().contiguous()
        if order_I is not None:
            start, stop, wanted = 0, self.shape[1], order_I[start:stop]
        words = slice(start // per_word, -(-stop // per_word))
        if self.settings.method == "gptq":
            packed = self._parts["qweight"][words, rows].t().contiguous()
        else:
            packed = self._parts["weight_packed"][rows, words].contiguous()
        values_OI = _unpacked(packed, bits)[:, start - words.start * per_word :][:, : stop - start]
        return values_OI if order_I is None else values_OI[:, wanted]

    def _output_groups(self, stored: Tensor, outputs: range, groups_S: Tensor) -> Tensor:
        """[O, S] of scales."""
        if self.settings.method == "compressed-tensors":
            return stored.reshape(self.shape[0], -1)[outputs.start : outputs.stop][:, groups_S].contiguous()
        return stored[groups_S][:, outputs.start : outputs.stop].t().contiguous()

    def _zeros(self, outputs: range, groups_S: Tensor) -> Tensor:
        """uint8 [O, S], as stored."""
        bits = self.settings.bits
        if self.settings.method == "compressed-tensors":
            packed = self._parts["weight_zero_point"].t().contiguous()  # [S, words of outputs]
        else:
            packed = self._parts["qzeros"]
        zeros_SO = _unpacked_awq(packed) if self.settings.method == "awq" else _unpacked(packed.contiguous(), bits)
        return zeros_SO[groups_S][:, outputs.start : outputs.stop].t().contiguous()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """uint8 [N, numbers] of int32 [N, words]: lower bits first."""
    octets: Tensor = words.to(torch.int32).contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _unpacked_awq(words: Tensor) -> Tensor:
    """uint8 [N, 8 · words], in AWQ's order of four bits each."""
    fours = _unpacked(words, 4).unflatten(-1, (-1, 8))
    outputs: Tensor = fours[..., list(_AWQ_PLACES)].flatten(-2)
    return outputs


def owner(tensor_name: str, settings: GroupSettings) -> tuple[str, str] | None:
    """(parameter, part) that a tensor of a quantised layer belongs to; None for any other tensor."""
    module, _, part = tensor_name.rpartition(".")
    needed, optional = _PARTS[settings.method]
    return (f"{module}.weight", part) if module and part in (*needed, *optional) else None
