"""The bytes that hlo.py writes by hand, as XLA reads them: any call comes out whole.

torch_xla parses the proto by XLA's own code and prints it as HLO text, which is here
compared with a text made of the call itself.
"""

import re
import struct

import torch
import torch_xla.core.xla_builder as xb
from hypothesis import given
from hypothesis import strategies as st

from xla_ops.core import hlo
from xla_ops.core.hlo import Spec

NAMES = {
    torch.bool: "pred",
    torch.int8: "s8",
    torch.int16: "s16",
    torch.int32: "s32",
    torch.int64: "s64",
    torch.uint8: "u8",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float8_e5m2: "f8e5m2",
    torch.float8_e4m3fn: "f8e4m3fn",
}
ABSENT = (0,)
COUNT = re.compile(r"/\*index=\d+\*/")  # XLA counts long lists


def shape(spec: Spec, layout: bool = True) -> str:
    text = f"{NAMES[spec.dtype]}[{','.join(map(str, spec.shape))}]"
    order = ",".join(str(i) for i in reversed(range(len(spec.shape))))
    return f"{text}{{{order}}}" if layout and spec.shape else text


def shapes(specs: list[Spec], layout: bool = True) -> str:
    """Of results: one array, or a tuple."""
    texts = ", ".join(shape(spec, layout) for spec in specs)
    return texts if len(specs) == 1 else f"({texts})"


def program(target, operands, results, config, aliases) -> str:
    """The HLO text of one call; operands of no element are constants of the module."""
    given = [(i, spec) for i, spec in enumerate(operands) if spec.shape != ABSENT]
    numbers = {i: n for n, (i, _) in enumerate(given)}
    names = [
        f"%p{numbers[i]}.{i + 1}" if i in numbers else f"%absent.{i + 1}"
        for i in range(len(operands))
    ]
    inputs = ", ".join(shape(spec) for _, spec in given)
    head = ", ".join(
        f"{names[i].removeprefix('%')}: {shape(s, layout=False)}" for i, s in given
    )
    root = len(operands) + 1
    lines = [
        f"HloModule {target}, entry_computation_layout="
        f"{{({inputs})->{shapes(results)}}}",
        "",
        f"ENTRY %main.{root + 1} ({head}) -> {shapes(results, layout=False)} {{",
    ]
    for i, spec in enumerate(operands):
        what = f"parameter({numbers[i]})" if i in numbers else "constant({})"
        lines.append(f"  {names[i]} = {shape(spec)} {what}")
    pairs = list(zip(operands, names, strict=True))
    call = [
        "custom-call(" + ", ".join(f"{shape(s)} {name}" for s, name in pairs) + ")",
        f'custom_call_target="{target}"',
        f"operand_layout_constraints={{{', '.join(map(shape, operands))}}}",
    ]
    if aliases:
        one = len(results) == 1
        texts = [
            f"{{{'' if one else result}}}: ({operand}, {{}})"
            for result, operand in sorted(aliases.items())
        ]
        call.append(f"output_to_operand_aliasing={{{', '.join(texts)}}}")
    call += ["api_version=API_VERSION_TYPED_FFI", f"backend_config={config}"]
    lines.append(f"  ROOT %custom-call.{root} = {shapes(results)} {', '.join(call)}")
    return "\n".join([*lines, "}"])


def attributes(values) -> str:
    """MLIR's spelling of a dictionary: floats by their bits, text by its bytes."""

    def spelled(value):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            return f"{value} : i64"
        if isinstance(value, float):
            return f"0x{struct.pack('>f', value).hex().upper()} : f32"
        plain = set(range(0x20, 0x7F)) - set(b'"\\')
        text = (chr(b) if b in plain else f"\\{b:02X}" for b in value.encode())
        return f'"{"".join(text)}"'

    return "{" + ", ".join(f"{k} = {spelled(v)}" for k, v in values.items()) + "}"


sizes = st.integers(0, 9) | st.sampled_from([127, 128, 300, 2**14, 2**31, 2**40])
# A product past 2^63 is no array, and a vector of no element is an absent operand.
specs = st.builds(
    Spec,
    st.lists(sizes, max_size=4)
    .map(tuple)
    .filter(lambda dims: dims != ABSENT and sum(n.bit_length() for n in dims) < 60),
    st.sampled_from(list(NAMES)),
)
absent = st.builds(Spec, st.just(ABSENT), st.sampled_from(list(NAMES)))
names = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
values = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(width=32)
    | st.text(st.characters(codec="utf-8"))
)


@given(data=st.data())
def test_any_call(data):
    draw = data.draw
    operands = [draw(specs), *draw(st.lists(specs | absent, max_size=12))]
    results = draw(st.lists(specs, min_size=1, max_size=5))
    # Results that share an operand's buffer are like it.
    present = [i for i, spec in enumerate(operands) if spec.shape != ABSENT]
    updated = draw(st.lists(st.sampled_from(present), max_size=3, unique=True))
    aliases = {}
    for operand in updated:
        result = draw(st.integers(0, len(results) - 1))
        results[result], aliases[result] = operands[operand], operand
    given = draw(st.dictionaries(names, values, max_size=6))
    target = draw(names) + "." + draw(names)
    config = hlo.encode_attributes(given)
    assert config == attributes(given)
    missing = [i for i, spec in enumerate(operands) if spec.shape == ABSENT]
    module = hlo.encode_module(target, operands, results, config, aliases, missing)
    read = xb.get_computation_hlo(xb.computation_from_module_proto(target, module))
    wanted = program(target, operands, results, config, aliases)
    assert COUNT.sub("", read).strip() == COUNT.sub("", wanted)
