"""The products of a Hopper warpgroup, which inline PTX wants written out register by register.

`declare` gives a function for each width N of a result, 64 rows x N columns of float, as blocks
`float c[N / 8][4]` (see kernels/hopper.cuh):

    wgmma<kTurnA, kTurnB>(c, a, b, more)   both factors in shared memory, by descriptors
    wgmma<kTurnB>(c, a, b, more)           a: u32[4], 16 columns in registers

c = a b + (more ? c : 0), over 16 numbers of each row. A factor is turned where its tile has the
sum's index along its rows, not its columns.
"""

from __future__ import annotations

WIDTHS = (32, 48, 64, 80, 96, 112, 128, 192, 256)

_TYPES = {"float16": "f16", "bfloat16": "bf16"}

_FUNCTION = """\
template <{template}>
DEVICE void wgmma(float (&c)[{blocks}][4], {a_parameter}, u64 b, int more) {{
  asm volatile(
      "{{.reg .pred more; setp.ne.b32 more, %{more}, 0;"
      "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{type}.{type} "
      "{{{sums}}}, {a_text}, %{b}, more, 1, 1, {turns};}}"
      : {outputs}
      : {inputs});
}}"""


def declare(dtype: str) -> str:
    """The functions for factors of a 16-bit dtype."""
    return "\n".join(
        _function(_TYPES[dtype], width, from_registers)
        for width in WIDTHS
        for from_registers in (False, True)
    )


def _function(kind: str, width: int, from_registers: bool) -> str:
    count = width // 2  # registers of the result in a thread: operands 0, 1, ...
    a = [f"%{count + i}" for i in range(4 if from_registers else 1)]
    b = count + len(a)
    turns = ["kTurnB"] if from_registers else ["kTurnA", "kTurnB"]
    inputs = [f'"r"(a[{i}])' for i in range(4)] if from_registers else ['"l"(a)']
    inputs += ['"l"(b)', '"r"(more)', *(f'"n"((int){turn})' for turn in turns)]
    return _FUNCTION.format(
        template=", ".join(f"bool {turn}" for turn in turns),
        blocks=width // 8,
        a_parameter="const u32 (&a)[4]" if from_registers else "u64 a",
        type=kind,
        width=width,
        sums=", ".join(f"%{i}" for i in range(count)),
        a_text="{" + ", ".join(a) + "}" if from_registers else a[0],
        b=b,
        more=b + 1,
        turns=", ".join(f"%{b + 2 + i}" for i in range(len(turns))),
        outputs=", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(count)),
        inputs=", ".join(inputs),
    )
