"""What the host does for GPU kernels: choosing, cutting work, describing arrays. Needs no GPU."""

import ctypes
import importlib.resources
import inspect
import itertools
import math
import re
import struct
import types

import numpy as np
import pytest

import fastattn
from fastattn._gpu import config, params, source, tensor_maps, wgmma

KERNEL_FILES = importlib.resources.files(fastattn) / "_gpu" / "kernels"
TILED = [kernel for kernel in config.KERNELS if kernel not in config.SMALL_KERNELS]
# Every architecture with every family that runs there.
PLACES = [
    pytest.param(arch, family, id=f"{family}-on-{arch}")
    for arch in config.ARCHS
    for family in config.FAMILIES
    if config.runs(family, arch)
]


def read(name):
    return (KERNEL_FILES / name).read_text(encoding="utf-8")


def tiled(arch, family):
    return [c for c in config.configs(arch, family) if c.kernel in TILED]


# ---- files -----------------------------------------------------------------------------------


def test_package_has_the_sources():
    names = {path.name for path in KERNEL_FILES.iterdir()}
    shared = {*source._SHARED, source._HALVES, *itertools.chain(*source._OF_KERNEL.values())}
    shared -= {"PARAMS", "WGMMA"}
    kernels = (*config.KERNELS, config.DECODE, *config.HOPPER_KERNELS)
    assert names == shared | {f"{k}.cu" for k in kernels}


def test_sources_include_nothing():
    for path in KERNEL_FILES.iterdir():
        assert "#include" not in path.read_text(encoding="utf-8")


def test_source_names_what_the_configuration_says():
    c = config.choose("forward", 80, "sm_80", "bfloat16", "all", 100, 100, 128)
    text = source.assemble(c)
    for line in (
        "#define kArch 80", "#define kOptions 63", "#define kWalk 0", f"constexpr int kD = {c.D};",
        f"constexpr int kBr = {c.Br};", f"constexpr int kThreads = {32 * c.warps};",
        "using Elem = bf16;", "using Tile = bf16;", "using Acc = float;", params.DECLARATION,
    ):  # fmt: skip
        assert text.count(line) == 1
    assert text.count('extern "C" __global__') == 1


def test_options_are_numbered_as_the_kernels_do():
    enum = re.search(r"enum Option \{(.*?)\}", read("pairs.cuh"), re.S)[1]
    numbers = {name[1:].lower(): int(n) for name, n in re.findall(r"(\w+) = (\d+)", enum)}
    assert numbers == {name: n for name, n in source._OPTIONS.items() if name}
    assert set(source._OPTIONS) == {"", *config.OPTIONS, "all"}


# ---- the choice ------------------------------------------------------------------------------


def test_choice_sees_neither_batch_nor_heads_nor_strides():
    assert list(inspect.signature(config.choose).parameters) == [
        "kernel", "arch", "family", "dtype", "options", "D", "Dv", "rows",
    ]  # fmt: skip


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_choice_is_listed_and_holds_the_head(arch, family):
    listed = set(config.configs(arch, family))
    edges = sorted({n + step for n in (*config.HEAD_TILES, 600) for step in (-1, 0, 1)})
    sizes = [0, 1, 8, *edges]
    pairs = [(n, n) for n in sizes] + list(itertools.product(sizes[::3], sizes[1::3]))
    choices = ("", *config.OPTIONS, "all")
    for kernel, dtype, options in itertools.product(TILED, config.DTYPES, choices):
        for D, Dv in [*pairs, (192, 128), (129, 97), (128, 192)]:
            for rows in config.ROW_CLASSES if kernel == "forward" else (128,):
                c = config.choose(kernel, arch, family, dtype, options, D, Dv, rows)
                assert c in listed and c.dtype == dtype
                if c.kernel in config.HOPPER_KERNELS:
                    assert c.kernel == on_hopper(kernel, dtype)
                    assert family == c.family == "sm_90a"
                    assert config.careful(c) in listed
                else:
                    few = rows == 16 and not (options or c.walk)
                    assert c.kernel == kernel or (few and c.kernel == config.DECODE)
                    assert c.family == ("sm_80" if family == "sm_90a" else family)
                assert c.options in (options, "all") and (c.options or not options)
                assert c.walk or (c.D >= D and c.Dv >= Dv)
                assert max(D, Dv) <= max(config.HEAD_TILES) or c.walk


def test_few_rows_have_small_tiles():
    for dtype, D in itertools.product(config.DTYPES, config.HEAD_TILES):
        chosen = [
            config.choose("forward", 90, "sm_80", dtype, "", D, D, rows)
            for rows in config.ROW_CLASSES
        ]
        heights = [c.Br for c in chosen]
        assert heights == sorted(heights)
        assert all(c.walk or c.Br <= rows for c, rows in zip(chosen, config.ROW_CLASSES))


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_masks_are_summed_alike_wherever_they_lie(arch, family):
    """Where a mask lies decides on the kernel (`_asked` in the driver), which may change no bit.
    But Hopper's take one of any layout."""
    for kernel, dtype, D in itertools.product(TILED, config.DTYPES, (*config.HEAD_TILES, 600)):
        parts = set()
        for options in ("bools", "numbers", "all"):
            c = config.choose(kernel, arch, family, dtype, options, D, D)
            if c.kernel in config.HOPPER_KERNELS:
                assert c.options == options != "all"
                continue
            parts.add((c.walk, c.D, c.Br if kernel == "backward_kv" else c.Bc))
        assert len(parts) == 1


def test_families():
    for arch in config.ARCHS:
        assert config.runs(config.default_family(arch), arch)
    assert {config.default_family(arch) for arch in config.ARCHS} == set(config.FAMILIES)
    assert [arch for arch in config.ARCHS if config.runs("sm_90a", arch)] == [90]
    older = (config.SPECIFIC_NVRTC[0], config.SPECIFIC_NVRTC[1] - 1)
    assert config.default_family(90, older) == config.default_family(89) == "sm_80"


def on_hopper(kernel, dtype):
    """The name of Hopper's own kernel."""
    return f"hopper_{kernel.replace('backward', 'halves') if dtype == 'float32' else kernel}"


HOPPER = [c for c in config.configs(90, "sm_90a") if c.kernel in config.HOPPER_KERNELS]


@pytest.mark.parametrize("own", ["forward", "backward_q", "backward_kv"])
def test_hopper_serves_many_rows(own):
    """Of 16 bits; and of float32, where tiles fit."""

    def kernel(dtype="float16", options="", D=64, Dv=64, rows=128, kernel=own):
        return config.choose(kernel, 90, "sm_90a", dtype, options, D, Dv, rows).kernel

    halves = {name for name in config.HOPPER_KERNELS if "halves" in name or "split" in name}
    assert len(halves) == 5
    listed = set(itertools.product({*config.HOPPER_KERNELS} - halves, ("float16", "bfloat16")))
    halves |= {"hopper_forward", "hopper_careful"}
    assert {(c.kernel, c.dtype) for c in HOPPER} == listed | {(x, "float32") for x in halves}
    for D, Dv in itertools.product((8, 64, 72, 128, 136, 192, 256), repeat=2):
        assert kernel(D=D, Dv=Dv) == f"hopper_{own}"
    for options in config.OPTIONS:  # one at a time, in 16 bits
        assert kernel(options=options) == kernel("bfloat16", options, 128, 8) == f"hopper_{own}"
        served = own == "forward" or options in ("bools", "segments")
        assert kernel(options=options, D=256) == (f"hopper_{own}" if served else own)
    for other in (
        dict(dtype="float64"), dict(options="all"), dict(D=264), dict(Dv=264), dict(D=0),
        dict(Dv=0), dict(D=68), dict(Dv=65),
    ):  # fmt: skip
        assert kernel(**other) == own
    few_rows = kernel(options="alibi", rows=64)
    assert few_rows == (own if own == "forward" else f"hopper_{own}")
    least = 4 if own == "forward" else 16
    for D, Dv in (
        (4, 4), (16, 20), (64, 64), (68, 128), (128, 12), (132, 8), (8, 256), (66, 64), (64, 2),
    ):  # fmt: skip
        fits = least <= min(D, Dv) and max(D, Dv) <= 128 and D % 4 == Dv % 4 == 0
        assert kernel("float32", D=D, Dv=Dv) == (on_hopper(own, "float32") if fits else own)
    assert kernel("float32", "alibi") == own
    assert kernel("float32", rows=64) == (own if own == "forward" else on_hopper(own, "float32"))
    for rows, few in ((16, config.DECODE), (64, own)):
        assert kernel(rows=rows) == (few if own == "forward" else f"hopper_{own}")
    for name in ("backward_bias", *config.SMALL_KERNELS):
        assert kernel(kernel=name) == name


def test_hopper_tiles_are_what_its_instructions_take():
    for c in HOPPER:
        if c.kernel == "hopper_split":  # rows of a head are padded to whole warps of lanes of 8
            assert c.D in (64, 128) and 128 % (32 // (c.D // 8)) == 0
            continue
        fast = c.kernel in config._CAREFUL  # with warps that load
        assert c.Br % 16 == c.Bc % 16 == c.D % 16 == c.Dv % 16 == 0
        assert (c.Bc if c.kernel.endswith("kv") else c.Br) % 64 == 0  # rows of products
        assert max(c.Br, c.Bc) <= 256  # rows of a copy
        if c.kernel.endswith("kv"):  # keys are the rows of products
            assert c.D == c.Dv and c.Bc == (128 if c.D <= 128 else 64)
            groups, share = 2, 1 if c.D <= 128 else 2
            widths = {c.Br // share, c.D // share}
            if c.dtype == "float32":  # 64 columns of the results at a time
                widths = {c.Br, 64}
            if c.kernel == "hopper_backward_qkv":  # 64 rows by 64 columns of dQ a warpgroup
                assert share == 1 and c.Br * -(-c.D // 64) * 64 == groups * 64 * 64
        else:
            groups = c.Br // 64
            widths = {c.Bc, c.D if c.kernel.endswith("_q") else c.Dv}
            if c.dtype == "float32":
                assert c.D == c.Dv and c.Dv in (64, 128)
                widths = {c.Bc, 64}
        assert widths <= set(wgmma.WIDTHS)
        assert c.warps == 4 * (groups + fast)
        assert c.shared_bytes <= config.shared_limit(90)
        if fast:
            text = read(f"{c.kernel}.cu")
            values = {"kGroups": groups, "kHalves": config.DTYPES[c.dtype] // 2, "kD": c.D}
            adds = c.options in ("bools", "numbers", "segments")
            values["kMoved"] = 8 * (adds and (c.Dv < 256 if c.kernel == "hopper_forward" else c.D <= 128))
            if c.kernel != "hopper_forward":
                text = read("hopper_backward.cuh")
            registers = [
                evaluate(f"({re.search(rf'{name} = ([^,;]*)', text)[1]})", values)
                for name in ("kComputers", "kLoaders")
            ]
            at_start = 65536 // c.threads // 8 * 8
            assert groups * registers[0] + registers[1] <= at_start * (groups + 1)


def test_fast_is_what_benchmarks_run():
    fast = {(c.kernel, c.dtype, c.D) for c in config.configs(90, "sm_80") if c.fast}
    sizes = {"float16": (64, 128, 256), "bfloat16": (64, 128, 256), "float32": (64, 128)}
    assert fast == {
        (kernel, dtype, D)
        for kernel in ("forward", config.DECODE, "backward_q", "backward_kv")
        for dtype in sizes
        for D in sizes[dtype]
    }


# ---- tiles, as the kernels need them ---------------------------------------------------------


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_warps_share_tiles_evenly(arch, family):
    for c in tiled(arch, family):
        own, other = (c.Bc, c.Br) if c.kernel == "backward_kv" else (c.Br, c.Bc)
        assert own % (16 * c.warps) == 0  # blocks of 16 rows
        assert other % 16 == 0  # two blocks of 8 columns, a step of the next product
        assert c.D % 16 == c.Dv % 16 == c.out_columns % 16 == 0
        assert c.threads <= 1024 and c.threads * c.blocks <= 1024


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_rows_of_tiles_lie_in_different_banks(arch, family):
    for c in tiled(arch, family):
        for pitch in (c.pitch(c.D), c.pitch(c.Dv)):
            assert pitch % 16 == 0
            if c.dtype == "float64":  # half a warp loads four rows of four numbers
                parts = {(row * pitch + 8 * t) % 128 for row in range(4) for t in range(4)}
                assert len(parts) == 16
            else:  # a matrix load takes 16 bytes of eight rows
                assert len({row * pitch % 128 for row in range(8)}) == 8


class Pointer:
    """A C pointer into shared memory: an offset in bytes, and the size of what it points to."""

    def __init__(self, offset, size):
        self.offset, self.size = offset, size

    def __add__(self, count):
        return Pointer(self.offset + count * self.size, self.size)


class Cast(int):
    """`Cast(size) @ pointer` is a C cast, with nearly the precedence of one."""

    def __matmul__(self, pointer):
        return Pointer(pointer.offset, int(self))


def evaluate(expression, names):
    """The value of a C expression of the few forms that the kernels' layouts have."""
    expression = re.sub(r"\((Tile|Acc|char|float)\*\)", r"\1 @ ", expression)
    expression = expression.replace("sizeof(Tile)", "Tile").replace("(int)", "")
    expression = expression.replace("||", "or").replace("&&", "and")
    choice = r"\(([^?()]+) \? ([^:()]+) : ((?:[^()]|\([^()]*\))+)\)"
    for _ in range(2):  # one may be in another
        expression = re.sub(choice, r"(\2 if \1 else \3)", expression)
    return eval(expression.replace(" / ", " // "), {}, names)


def layout(c):
    """The pointers of a kernel's shared memory, as its text has them, and the bytes they take."""
    acc = 8 if c.dtype == "float64" else 4
    [pitch] = re.findall(r"int pitch_of\(int columns\) \{\s+return (.*);\s+\}", read("arrays.cuh"))
    names = {
        "Tile": Cast(config.DTYPES[c.tile_dtype]), "Acc": Cast(acc), "char": Cast(1),
        "float": Cast(4), "kInHalves": c.halves,
        "kD": c.D, "kDv": c.Dv, "kBr": c.Br, "kBc": c.Bc, "kWalk": c.walk, "shared": Pointer(0, 1),
        "kWarps": c.warps,
    }  # fmt: skip
    names["pitch_of"] = lambda n: evaluate(pitch, {**names, "columns": n})
    declarations = read(f"{c.kernel}.cu").split("char shared[];")[1].split("const int warp =")[0]
    pattern = r"^ *(?:constexpr int|\w+\* const) (\w+) = (.*?);"
    pointers = {}
    for name, expression in re.findall(pattern, declarations, re.M):
        names[name] = value = evaluate(expression, names)
        if isinstance(value, Pointer):
            pointers[name] = value.offset
    assert {"sQ", "sK", "sV", "added"} <= set(pointers)
    return names, pointers, pointers["added"]


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_shared_memory_holds_what_kernels_lay_out(arch, family):
    for c in tiled(arch, family):
        names, pointers, used = layout(c)
        for columns in (c.D, c.Dv):
            assert names["pitch_of"](columns) * names["Tile"] == c.pitch(columns)
        assert not [name for name, offset in pointers.items() if offset % 16]
        columns = {"forward": c.Dv, "backward_kv": c.out_columns}.get(c.kernel, c.D)
        results = 16 * c.warps * (columns + 4) * names["Acc"]
        if c.kernel == "backward_bias":
            results = c.Br * (c.Bc + 1) * names["Acc"]
        assert max(used, results) <= c.shared_bytes <= config.shared_limit(arch)
        assert used == c.shared_bytes or used < results <= c.shared_bytes  # and no more
        # Tiles of a mask and bias come behind the buffers, as `load_added` writes them.
        for bools, size in itertools.product((False, True), (0, 2, 4, 8)):
            pitches = {"kBr": c.Br, "kBc": c.Bc, "size": size}
            rows = c.Br * (bools * pitch_of("bools", pitches) + pitch_of("numbers", pitches))
            bytes_added = c.added_bytes(c.Br * bools, c.Br, size)
            assert bytes_added == rows and bytes_added % 16 == 0
            assert c.shared_bytes_with(bytes_added) >= used + rows
        assert c.shared_bytes <= c.most_shared_bytes <= config.shared_limit(arch)


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_rings_of_decode_hold_what_the_kernel_lays_out(arch, family):
    """Q, and a ring for each warp, whose second stage has room for the warp's results."""
    listed = [c for c in config.configs(arch, family) if c.kernel == config.DECODE]
    assert {(c.dtype, c.D) for c in listed} >= {("float16", n) for n in config.HEAD_TILES}
    text = read("decode.cu")
    for c in listed:
        names = {"kBc": c.Bc, "kD": c.D, "kDv": c.Dv}
        names["pitch_of"] = lambda columns, c=c: c.pitch(columns) // size(c)
        stage, row = (
            eval(re.search(rf"{name} = (.*?);", text)[1], names) for name in ("kStage", "kRow")
        )
        bytes_of_q, stages = c.Br * c.pitch(c.D), config.DECODE_STAGES
        assert c.shared_bytes == bytes_of_q + c.warps * stages * stage * size(c)
        assert c.shared_bytes <= config.shared_limit(arch) and stages >= 2
        assert c.Br * row * 4 <= stage * size(c)  # Acc is float
        for step in (bytes_of_q, stage * size(c), row * 4):
            assert step % 16 == 0
        assert c.Br == 16 and c.Bc % 16 == 0 and c.dtype != "float64"


def size(c):
    """Bytes of a number in a tile."""
    return config.DTYPES[c.tile_dtype]


def pitch_of(name, values):
    """The pitch of a tile of a mask or bias with many rows."""
    [pitch] = re.findall(rf"int {name}_pitch\(.*\{{\s+.*one_row \? 0 : (.*);", read("pairs.cuh"))
    return eval(pitch.replace("(int)p.numbers_size", "size"), {}, values)


def hopper_layout(c):
    """The sizes of a kernel's buffers, as its texts have them."""
    functions = re.findall(
        r"^constexpr int (panels_of|tile_bytes)\((.*?)\) \{\s+return (.*);\s+\}",
        read("hopper.cuh"),
        re.M,
    )
    [panel] = re.findall(r"kPanel = (\d+);", read("hopper.cuh"))
    assert len(functions) == 2
    names = {
        "kPanel": int(panel), "kBr": c.Br, "kBc": c.Bc, "kD": c.D, "kDv": c.Dv,
        "kShare": c.kernel.endswith("_kv") and c.D > 128,
        "kHalves": config.DTYPES[c.dtype] // 2, "kGroups": c.Br // 64, "kStage": 16 * 32 * 4,
    }  # fmt: skip
    row = r"kAddedRow = kBits \? (.*) : has\(kBools\) \? (.*) : (.*);"
    rows = dict(zip(("segments", "bools", "numbers"), *re.findall(row, read("hopper_forward.cuh"))))
    names["kAddedRow"] = evaluate(rows.get(c.options, "0"), names)
    names["kAdders"] = c.Br // 64 if c.options in rows else 0
    names["kAdds"] = c.options in ("bools", "numbers", "segments")
    if c.kernel.startswith(("hopper_backward", "hopper_careful_")):
        names["kAdders"] = 2 * names["kAdds"]
        names["kGroups"] = 2
    names["kRowsOf"] = c.Br // 2 if names["kShare"] else c.Br
    names["kBits"] = c.options in ("bools", "segments")
    for name, parameters, expression in functions:
        words = [parameter.split()[1] for parameter in parameters.split(", ")]
        names[name] = lambda *given, e=expression, w=words: evaluate(e, names | dict(zip(w, given)))
    for name in (*source._OF_KERNEL[c.kernel], f"{c.kernel}.cu"):
        declarations = "" if name == "WGMMA" else read(name).split('extern "C"')[0]
        pattern = r"^constexpr int (k(?:Stages|Bytes|Buffers|Most).*);"
        for line in re.findall(pattern, declarations.replace("=\n    ", "= "), re.M):
            for each in re.split(r", (?=k\w+ =)", line):
                name, expression = each.split(" = ")
                names[name] = evaluate(f"({expression})", names)
    return names


def test_hopper_shared_memory_holds_what_kernels_lay_out():
    for c in HOPPER:
        names = hopper_layout(c)
        tile = names["tile_bytes"]
        inputs = tile(c.Br, c.D) + tile(c.Bc, c.D) + tile(c.Bc, c.Dv)
        halves = c.dtype == "float32"
        if c.kernel == "hopper_careful":
            added = c.Br * names["kAddedRow"]
            assert c.shared_bytes == inputs + halves * 4 * (c.Br + 2 * c.Bc) + added
        elif c.kernel == "hopper_forward":
            apart = names["kBuffers"] + names["kBytesO"] <= names["kMost"]
            used = names["kBuffers"] + apart * names["kBytesO"]
            barriers = 2 + 2 * 2 + 4 * names["kStages"] + halves * (1 + 2 * names["kStages"])
            barriers += names["kStages"] + 2 * names["kAdders"]
            rest = names["kBytesRest"]
            assert 2 * 32 + names["kStages"] * 16 + 8 * barriers <= rest
            rest += names["kBytesWeights"] + names["kAdders"] * names["kBytesAdded"]
            assert c.shared_bytes == used + rest
            assert names["kMost"] + rest == config.shared_limit(90)
            assert apart or not halves
        elif c.kernel in ("hopper_backward_q", "hopper_backward_kv", "hopper_backward_qkv"):
            adders = names["kAdders"]
            own = 4 + 2 * names["kStagesK"] + 2 * names["kStagesV"] if c.kernel[-1] == "q" else 0
            stages = names["kStagesK"] if own else names["kStages"]
            barriers = 2 * 2 + (own or 3 + 4 * stages)
            if adders:
                barriers += stages + 2 * adders * names["kStagesAdded"]
            assert 2 * 8 + 16 * stages * bool(adders) + 8 * barriers <= 256
            rest = names.get("kBytesRest", 256)
            assert rest == 256 + names.get("kStagesAdded", 0) * names["kBytesAdded"]
            used = names["kBuffers"] + rest
            results = names.get("kBytesResults", 0)
            assert c.shared_bytes == used + results * (used + results <= config.shared_limit(90))
        elif c.kernel == "hopper_split":
            assert c.shared_bytes == 0 and "extern __shared__" not in read("hopper_split.cu")
        elif c.kernel == "hopper_finish_q":
            assert c.shared_bytes == tile(c.Br, c.D)
        elif "halves" in c.kernel:
            own, other = (c.Bc, c.Br) if c.kernel.endswith("kv") else (c.Br, c.Bc)
            stages = names.get("kStages", 1)
            rows = own + stages * other  # each of two arrays, with weights and spreads
            used = (
                tile(rows, c.D) + tile(rows, c.Dv) + (4 if "careful" in c.kernel else 3) * 4 * rows
            )
            if c.kernel.endswith("kv"):
                used += 2 * 4 * stages * other  # lse and delta
            if "careful" in c.kernel:
                assert c.shared_bytes == used
            else:
                laid_out = ("kBuffers", "kBytesWeights", "kBytesNumbers")
                assert used == sum(names.get(name, 0) for name in laid_out)
                assert 8 * (2 + 4 * stages) <= 256 == c.shared_bytes - used
        else:
            used = inputs + names["kBytesO"] + names["kBytesAdded"]
            if c.kernel == "hopper_careful_kv":
                used += 2 * (names["kBytesP"] + names["kBytesRows"])
            assert c.shared_bytes == used


@pytest.mark.parametrize("arch", config.ARCHS)
def test_small_kernels_take_no_shared_memory_of_their_own(arch):
    for kernel in config.SMALL_KERNELS:
        c = config.choose(kernel, arch, config.default_family(arch), "float32", "all", 64, 64)
        assert c.shared_bytes == c.most_shared_bytes == 0
        assert "extern __shared__" not in read(f"{kernel}.cu")


@pytest.mark.parametrize(("arch", "family"), PLACES)
def test_padded_rows_hold_whole_tiles(arch, family):
    [pad] = map(int, re.findall(r"kRowPad = (\d+);", read("gradient.cuh")))
    for c in tiled(arch, family):
        assert c.kernel == "forward" or pad % c.Br == 0


# ---- the kernels' argument -------------------------------------------------------------------


def fields_of(declaration):
    """(type, name) of the fields of a C struct; functions end the list."""
    fields = []
    for line in re.sub(r"//.*", "", declaration).split(";")[:-1]:
        if "{" in line or not line.strip():
            break
        kind, names = re.fullmatch(r"\s*(.*?[\w*])\s+(\w+(?:, \w+)*)\s*", line).groups()
        fields += [(kind, name) for name in names.split(", ")]
    return fields


def test_array_is_declared_as_it_is_packed():
    body = re.search(r"struct Array \{(.*?)\n\};", read("arrays.cuh"), re.S)[1]
    fields = fields_of(body.split("DEVICE")[0])
    assert tuple(name for _, name in fields) == params.ARRAY_FIELDS
    assert {kind for kind, _ in fields} <= {"char*", "const i64*", "i64"}


def test_params_are_declared_as_they_are_packed():
    body = re.fullmatch(r"struct Params \{(.*)\};", params.DECLARATION, re.S)[1]
    fields = fields_of(body)
    assert len({name for _, name in fields}) == len(fields)

    # Every number a different one; each is looked for where C has its field, all being 8 bytes.
    numbers = itertools.count(1)
    arrays = {n: tuple(next(numbers) for _ in params.ARRAY_FIELDS) for n in params.ARRAYS}
    options = {name: next(numbers) for name in params.OPTIONS}
    launch = {name: next(numbers) for name in params.LAUNCH}
    block = np.zeros(params.SIZE // 8, np.int64)
    params.pack(block, arrays, tuple(options.values()), launch)
    scalars = options | launch
    packed, offset = block.tobytes(), 0
    for kind, name in fields:
        if kind == "Array":
            size = 8 * len(params.ARRAY_FIELDS)
            assert struct.unpack_from(f"{size // 8}q", packed, offset) == arrays[name]
        else:
            assert kind in ("i64", "u64", "double") or kind.endswith("*")
            size, letter = 8, "d" if kind == "double" else "Q" if kind == "u64" else "q"
            assert struct.unpack_from(letter, packed, offset) == (scalars[name],)
        offset += size
    assert offset == len(packed) == params.SIZE
    assert params.SIZE <= 4096  # of a kernel's arguments


def test_params_that_are_not_given_are_zero():
    block = np.full(params.SIZE // 8, -1, np.int64)
    options = dict.fromkeys(params.OPTIONS, 0) | {"seed": 2**64 - 1}
    params.pack(block, {}, tuple(options.values()), {})
    assert np.count_nonzero(block) == 1 and -1 in block
    with pytest.raises(struct.error):
        params.pack(block, {}, tuple((options | {"seed": 2**64}).values()), {})
    with pytest.raises(KeyError):
        params.pack(block, {}, tuple(options.values()), {"seed": 1})


def test_kernels_read_fields_that_exist():
    names = {*params.ARRAYS, *params.OPTIONS, *params.LAUNCH}
    text = "".join(read(path.name) for path in KERNEL_FILES.iterdir())
    used = set(re.findall(r"\bp\.(\w+)", re.sub(r"//.*", "", text)))
    assert used <= names
    assert names <= used  # and no field is for nothing


# ---- the driver: imports CuPy, which needs no GPU for that ----------------------------------


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("cupy")
    from fastattn._gpu import driver

    return driver


@pytest.fixture(scope="module")
def device():
    pytest.importorskip("cupy")
    from fastattn._gpu import device

    return device


def test_family_is_the_environments(device, monkeypatch):
    monkeypatch.delenv("FASTATTN_GPU_ARCH", raising=False)
    assert device._family(90) == config.default_family(90)
    monkeypatch.setenv("FASTATTN_GPU_ARCH", "")
    assert device._family(75) == config.default_family(75)
    for family, oldest in config.FAMILIES.items():
        monkeypatch.setenv("FASTATTN_GPU_ARCH", family)
        assert device._family(oldest) == family
        if family.endswith("a"):
            continue
        assert device._family(oldest + 1) == family
        with pytest.raises(RuntimeError, match=rf"{family}, which needs.* {oldest / 10};"):
            device._family(oldest - 1)
    for unknown in ("sm_1", "80", "SM_80", "sm_80 "):
        monkeypatch.setenv("FASTATTN_GPU_ARCH", unknown)
        with pytest.raises(ValueError, match="FASTATTN_GPU_ARCH.*sm_75, sm_80, sm_90a"):
            device._family(90)


def test_tensor_maps_say_where_the_array_is(monkeypatch):
    told = []

    def encode(address, kind, rank, pointer, sizes, strides, box, steps, *rest):
        def read(kind, count, at):
            return tuple((kind * count).from_address(at))

        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        told.append(
            (kind, rank, pointer, read(u64, 4, sizes), read(u64, 3, strides), read(u32, 4, box))
        )
        assert address % 64 == 0 and read(u32, 4, steps) == (1, 1, 1, 1)
        assert rest == (0, 3, 2, 0)  # no interleaving, 128-byte swizzle, L2, zeros outside
        ctypes.memset(address, 7, 128)
        return 0

    monkeypatch.setattr(tensor_maps, "_encode", lambda: encode)

    def make(pointer, *rest):
        return tensor_maps.tensor_map(pointer, tensor_maps.Tiles("bfloat16", *rest))

    found = make(1024, 72, 300, 4, 2, 144, 43200, 172800, 128)
    assert told == [(9, 4, 1024, (72, 300, 4, 2), (144, 43200, 172800), (64, 128, 1, 1))]
    held = range(found.storage.ctypes.data, found.storage.ctypes.data + found.storage.nbytes)
    assert found.address in held and found.address + 127 in held
    assert (found.storage == 7).sum() == 128
    make(1024, 72, 1, 1, 1, -3, 0, 1 << 50, 128)  # strides of axes of one say nothing
    assert told[-1][4] == (16, 16, 16)
    make(1024, 72, 300, 4, 2, 0, 0, 0, 128)  # broadcast
    assert told[-1][4] == (0, 0, 0)
    for pointer, row, head in (
        (1032, 144, 288), (1024, -144, 288), (1024, 150, 288), (1024, 144, 1 << 40),
    ):  # fmt: skip
        assert make(pointer, 72, 300, 4, 2, row, head, 43200, 128) is None
    monkeypatch.setattr(tensor_maps, "_encode", lambda: lambda *args: 1)
    assert make(1024, 72, 300, 4, 2, 144, 43200, 172800, 128) is None  # the driver refuses
    [panel] = map(int, re.findall(r"kPanel = (\d+);", read("hopper.cuh")))
    for dtype, box in tensor_maps._BOX.items():
        halves = config.DTYPES[dtype] // 2
        assert box == panel // halves and box * config.DTYPES[dtype] == 128
    tiles = tensor_maps.Tiles("float32", 72, 300, 4, 2, 288, 86400, 345600, 64)
    monkeypatch.setattr(tensor_maps, "_encode", lambda: encode)
    tensor_maps.tensor_map(1024, tiles)
    strides = (288, 86400, 345600)
    assert told[-1] == (7, 4, 1024, (72, 300, 4, 2), strides, (32, 64, 1, 1))


def test_constants_are_those_of_the_kernels(driver):
    [pad] = map(int, re.findall(r"kRowPad = (\d+);", read("gradient.cuh")))
    assert driver._ROW_PAD == pad
    [most] = map(int, re.findall(r"kMost = (\d+);", read("combine.cu")))
    assert driver._MOST_SPLITS == most
    [far] = re.findall(r"kFar = 1 << (\d+);", read("pairs.cuh"))
    assert driver.LONGEST * 2 <= 1 << int(far)
    access = re.search(r"enum Access : i64 \{ (.*?) \}", read("arrays.cuh"))[1].split(", ")
    assert access == ["kBytes", "kElements", "kVectors"]
    assert (driver._BYTES, driver._ELEMENTS, driver._VECTORS) == (0, 1, 2)
    kinds = re.search(r"enum Kind : i64 \{ (.*?) \}", read("arrays.cuh"))[1].split(", ")
    assert kinds == ["kBool", "kF16", "kBf16", "kF32", "kF64"]
    names = ["bool", *config.DTYPES]
    assert list(driver._KIND_NAMES) == names
    arrays = [np.zeros(0, name) for name in names if name != "bfloat16"]
    assert [driver._kind(array) for array in arrays] == [0, 1, 3, 4]
    assert driver._kind(None) == 0


def test_options_go_by_their_names(driver):
    """Every value a different one, found under its name; both forms of those that have two."""

    def at(address, dtype="float32"):
        return types.SimpleNamespace(address=address, dtype=np.dtype(dtype))

    sizes = dict(batch=2, Hq=12, Hkv=4, group=3, Lq=5, Lk=6, D=7, Dv=8, scale=0.5, softcap=9.0)
    given = dict(
        **sizes, window_left=10, window_right=11, causal_offset=at(13), q_lens=at(14),
        kv_lens=at(15), alibi_slopes=at(16), sinks=at(17), attn_mask=at(0, "float64"),
        bias=at(0, "float16"), dropout_p=0.75, seed=at(18),
    )  # fmt: skip
    addresses = ("q_lens", "kv_lens", "alibi_slopes", "sinks")

    def options(**problem):
        values = driver._Call._options(
            types.SimpleNamespace(problem=types.SimpleNamespace(**problem), natural=True)
        )
        assert len(values) == len(params.OPTIONS)
        return dict(zip(params.OPTIONS, values))

    assert options(**given) == dict(
        **sizes, window_left=10, window_right=11, causal_offset=0, causal_offsets=13,
        **{name: given[name].address for name in addresses}, attn_mask_kind=4, bias_kind=1,
        natural=1, cap_scale=0.5 / 9.0, seed=0, seed_at=18, dropout_threshold=3 << 30,
        keep_scale=4.0,
    )  # fmt: skip
    host = given | dict(causal_offset=-19, seed=20, window_left=0, window_right=0)
    expected = dict(causal_offset=-19, causal_offsets=0, seed=20, seed_at=0)
    assert expected.items() <= options(**host).items()
    assert options(**host)["window_left"] == options(**host)["window_right"] == 0
    absent = given | dict.fromkeys([name for name in given if name not in sizes])
    rest = [name for name in params.OPTIONS if name not in sizes]
    expected = dict.fromkeys(rest, 0) | dict(
        window_left=-1, window_right=-1, keep_scale=1.0, natural=1, cap_scale=0.5 / 9.0
    )
    assert options(**absent | {"dropout_p": 0.0, "seed": 0}) == sizes | expected
    all_dropped = options(**given | {"dropout_p": 1.0})
    assert (all_dropped["dropout_threshold"], all_dropped["keep_scale"]) == (1 << 32, 0.0)


def test_splits_cover_the_keys(driver):
    tile = {config.choose("forward", 90, "sm_80", d, "", 64, 64, 16) for d in config.DTYPES}
    lengths = {0, 1, driver.LONGEST}
    for n in (driver._SPLIT_KEYS, driver._SPLIT_KEYS * driver._MOST_SPLITS, 10**6):
        lengths |= {n - 1, n, n + 1}
    for c, Lk in itertools.product(tile, sorted(lengths)):
        splits, keys = driver._split(Lk, c)
        assert 1 <= splits <= driver._MOST_SPLITS
        tiles = c.warps if c.kernel == config.DECODE else 1  # of which each warp has as many
        assert keys % (tiles * c.Bc) == 0 and keys >= driver._SPLIT_KEYS
        assert splits * keys >= Lk
        assert splits == 1 or (splits - 1) * keys < Lk  # none is empty


class Standin(np.ndarray):
    """A NumPy array whose address is where a Layout has it."""

    address = property(lambda self: self.ctypes.data)


@pytest.fixture
def call(driver, monkeypatch):
    """A call that describes Standins, and makes its tables at once."""
    from fastattn._gpu import plan

    monkeypatch.setattr(plan, "cupy", np)
    call = object.__new__(driver._Call)
    call.alive = []

    def table(*args):
        call.alive.append(plan.Table(*args).make())
        return call.alive[-1].ctypes.data

    call.table = table
    return call


def addresses(call, described, batch, shape):
    """Where a kernel looks for each element, from an array's description."""
    data, batches, step, head, row, column, _ = described
    at = np.arange(batch, dtype=np.int64) * step
    if batches:
        [table] = [table for table in call.alive if table.ctypes.data == batches]
        at = np.array(table).reshape(-1)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return data + at[:, None, None, None] + grid[0] * head + grid[1] * row + grid[2] * column


def actual_addresses(array):
    address = np.full((), array.ctypes.data, np.int64)
    for axis, (n, stride) in enumerate(zip(array.shape, array.strides)):
        along = np.arange(n, dtype=np.int64) * stride
        address = address + along.reshape([n] + [1] * (array.ndim - axis - 1))
    return address.reshape(-1, *array.shape[-3:])


def views(dtype):
    """Arrays of five axes with all kinds of strides."""
    size = np.dtype(dtype).itemsize
    memory = np.zeros(2 * 3 * 4 * 5 * 16 * size + 64, np.uint8)
    aligned = -memory.ctypes.data % 16
    plain = memory[aligned:][: 2 * 3 * 4 * 5 * 16 * size].view(dtype).reshape(2, 3, 4, 5, 16)
    odd = memory[aligned + 1 :][: 2 * 3 * 4 * 5 * 16 * size].view(dtype).reshape(2, 3, 4, 5, 16)
    yield "plain", plain
    yield "unaligned", odd
    yield "batches swapped", plain.swapaxes(0, 1)
    yield "heads inside", plain.swapaxes(-2, -3)
    yield "columns outside", plain.swapaxes(-1, -2)
    yield "backwards", plain[::-1, :, ::-1, ::-1, ::-1]
    yield "every other batch", plain[:, ::2]
    yield "broadcast batch", np.broadcast_to(plain[:1], plain.shape)
    yield "broadcast inner batch", np.broadcast_to(plain[:, :1], plain.shape)
    yield "broadcast", np.broadcast_to(plain[:1, :1, :1, :, :1], plain.shape)
    yield "part of the columns", plain[..., 1:9]
    yield "few columns", plain[..., :3]
    yield "one batch", plain[0, 0]
    yield "one axis", plain[1]
    yield "axis of one", plain[:, :1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_kernels_find_every_element(driver, call, dtype):
    for name, view in views(dtype):
        array = view.view(Standin)
        described = call.array(array)
        wanted = actual_addresses(view)
        found = addresses(call, described, len(wanted), view.shape[-3:])
        assert (found == wanted).all(), name
        if described[-1] == driver._VECTORS:
            assert described[-2] == view.itemsize, name
            assert (wanted[..., 0] % 16 == 0).all(), name
            assert view.shape[-1] * view.itemsize % 16 == 0, name
        elif described[-1] == driver._ELEMENTS:
            assert (wanted % view.itemsize == 0).all(), name
        expected = {"plain": driver._VECTORS, "unaligned": driver._BYTES}
        assert described[-1] == expected.get(name, described[-1])


def test_usual_layouts_need_no_table(call):
    for name, view in views(np.float32):
        if name in ("plain", "heads inside", "columns outside", "one batch", "one axis"):
            assert call.array(view.view(Standin))[1] == 0
    assert not call.alive


def test_kernels_find_every_row(driver, call):
    for name, view in views(np.float32):
        view = view[..., 0]
        described = call.rows(view.view(Standin))
        wanted = actual_addresses(view[..., None])
        found = addresses(call, described, len(wanted), (*view.shape[-2:], 1))
        assert (found == wanted).all(), name
        assert described[-1] == (driver._BYTES if name == "unaligned" else driver._ELEMENTS)


def test_offsets_are_of_the_axes_that_stay(call):
    call.offsets((2, 3, 4), [100, 10, 1], [False, True, False])
    [table] = call.alive
    assert np.array_equal(table, np.add.outer([0, 100], [0, 1, 2, 3]))


def masked(call, problem, **arrays):
    """What a call makes of its options; `problem` names those that are not arrays."""
    given = dict(
        softcap=0.0, alibi_slopes=None, dropout_p=0.0, q_segment_ids=None, attn_mask=None,
        bias=None, acc=np.float32, dtype="float16",
    )  # fmt: skip
    call.problem = types.SimpleNamespace(**given | problem | arrays)
    call.natural, call.packed = problem.get("natural", bool(arrays)), problem.get("packed", False)
    arrays = {name: call.array(array) for name, array in arrays.items()}
    return call._asked(arrays, problem.get("any_layout", False))


def scores(dtype, columns=64, shape=(2, 3, 40)):
    """An array like a mask, whose address is a multiple of 16."""
    memory = np.zeros(math.prod(shape) * columns * np.dtype(dtype).itemsize + 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: memory.size - 16]
    return memory.view(dtype).reshape(*shape, columns).view(Standin)


def test_single_options_have_kernels_of_their_own(driver, call):
    assert masked(call, {}) == ("", {})
    for problem, name in (
        (dict(softcap=3.0, natural=True), "softcap"),
        (dict(alibi_slopes=1, natural=True), "alibi"),
        (dict(dropout_p=0.1), "dropout"),
        (dict(q_segment_ids=1), "segments"),
        (dict(natural=True), "all"),  # for its scale
        (dict(dropout_p=0.1, natural=True), "all"),
        (dict(softcap=3.0, dropout_p=0.1, natural=True), "all"),
    ):
        assert masked(call, problem) == (name, {})
    mask = scores(np.bool_)
    assert masked(call, {"natural": False}, attn_mask=mask)[0] == "bools"
    for array in (mask, scores(np.float16)):
        name = "bools" if array is mask else "numbers"
        for axis in (0, 1, 2):  # of a mask that is broadcast along it
            alike = np.broadcast_to(array.take([0], axis), array.shape).view(Standin)
            chosen, added = masked(call, {"natural": array is not mask}, attn_mask=alike)
            assert (chosen, added[f"{name}_one_row"]) == (name, axis == 2)
        assert masked(call, dict(softcap=3.0), attn_mask=array)[0] == "all"
        assert masked(call, dict(packed=True), attn_mask=array)[0] == "all"
    for of in ("attn_mask", "bias"):
        chosen, added = masked(call, {}, **{of: scores(np.float16)})
        assert chosen == "numbers" and added["numbers_copied"] and added["numbers_size"] == 2


def test_other_masks_are_left_to_all(driver, call):
    for arrays, size, copied in (
        (dict(attn_mask=scores(np.bool_, 70)), 4, False),  # rows that are not aligned
        (dict(bias=scores(np.float16, 70)), 4, False),
        (dict(bias=scores(np.float32)), 4, True),
        (dict(bias=scores(np.float64)), 4, False),
        (dict(bias=scores(np.float16), attn_mask=scores(np.float16)), 4, False),
        (dict(bias=scores(np.float16), attn_mask=scores(np.bool_)), 2, True),
        (dict(bias=scores(np.float32), attn_mask=scores(np.bool_, 70)), 4, False),
    ):
        chosen, added = masked(
            call, {}, **{k: a[..., :64].view(Standin) for k, a in arrays.items()}
        )
        assert chosen == "all"
        assert (added["numbers_size"], bool(added["numbers_copied"])) == (size, copied)
        assert added.get("bools", 0) == (len(arrays) == 2 and copied)


@pytest.mark.parametrize("name", ["bools", "numbers"])
def test_hopper_is_given_masks_of_any_layout(name, driver, call):
    """By what is no layout: they are alone, of the dtype of q, with keys in whole 4 bytes."""
    dtype = {"bools": np.bool_, "numbers": np.float16}[name]
    whole = scores(dtype, 64)
    for columns in range(56, 65):
        fits = columns * np.dtype(dtype).itemsize % 4 == 0
        cut, wide = whole[..., :columns], scores(dtype, 80)[..., 3 : 3 + columns]
        turned = whole[:, :, :columns].swapaxes(-1, -2)[:, :, :, ::-1][..., :columns]
        for x in (cut, wide, turned, np.broadcast_to(cut[:, :, :1], cut.shape)):
            given = {"natural": dtype != np.bool_, "any_layout": True, "Lk": columns}
            chosen, added = masked(call, given, attn_mask=x.view(Standin))
            assert chosen == (name if fits else "all")
            one_row = added.get(f"{name}_one_row", False)
            assert not fits or one_row == (x.strides[-2] == 0)
    other = scores(np.float32)
    assert masked(call, {"any_layout": True, "Lk": 64}, bias=other)[0] == "all"
    assert masked(call, {"any_layout": True, "Lk": 64}, attn_mask=whole, bias=other)[0] == "all"


def test_hopper_serves_masks_wherever_they_lie(launches, driver):
    from fastattn.attention import attention_forward

    cupy = driver.cupy

    def kernels(dtype=np.float16, L=300, **options):
        with cupy.cuda.using_allocator(Memory(0x7F0000000000)):
            q, k = (cupy.ndarray((2, 4, n, 64), dtype) for n in (300, L))
            options = {name: make(cupy) for name, make in options.items()}
            launches.clear()
            attention_forward(q, k, k, **options)
        return [x[0] for x in launches if type(x[0]) is str]

    hopper = ["hopper_forward", "hopper_careful"]
    for view in (
        lambda cp: cp.ndarray((2, 1, 300, 300), bool), lambda cp: cp.ndarray(300, bool),
        lambda cp: cp.ndarray((300, 300), bool).T, lambda cp: cp.ndarray((300, 1), np.float16),
        lambda cp: cp.ndarray((300, 307), np.float16)[:, 3:303],
    ):  # fmt: skip
        assert kernels(attn_mask=view) == ["survey", *hopper]
    assert kernels(bias=lambda cp: cp.ndarray((300, 300), np.float16)) == hopper
    ids = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), lambda cp: cp.ndarray(300, np.int64))
    assert kernels(**ids) == ["survey", *hopper]
    for options in (
        {"softcap": lambda cp: 3.0}, {"alibi_slopes": lambda cp: cp.ndarray(4, np.float32)},
        {"dropout_p": lambda cp: 0.5, "seed": lambda cp: 1},
    ):  # fmt: skip
        assert kernels(**options) == hopper
        assert kernels(np.float32, **options) == ["forward"]
        assert kernels(**options, **ids) == ["survey", "forward"]
    assert kernels(L=301, attn_mask=lambda cp: cp.ndarray((300, 301), bool)) == [
        "survey",
        "forward",
    ]


def test_a_mask_without_keys_is_not_looked_at(call):
    """Its strides may be 0, as if all keys were alike, but there is none."""
    mask = np.broadcast_to(np.zeros((5, 1), np.bool_), (1, 1, 5, 0)).view(Standin)
    call.problem = types.SimpleNamespace(
        batch=1, Hq=1, Lq=5, Lk=0, attn_mask=mask, q_segment_ids=None
    )
    chosen = config.choose("forward", 80, "sm_80", "float16", "bools", 64, 64)
    call.launch = None  # would be called
    assert call.survey(chosen, {"attn_mask": (0, 0, 0, 0, 0, 0, 0)}) == {}


# ---- plans -----------------------------------------------------------------------------------


class Memory:
    """An allocator whose addresses are made up, and that says what was asked for."""

    def __init__(self, start):
        self.next, self.sizes = start, []

    def __call__(self, size):
        import cupy

        start, self.next = self.next, self.next + -(-size // 512) * 512
        self.sizes.append(size)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, size, self, 0), 0)


@pytest.fixture
def launches(driver, device, monkeypatch):
    """What kernels would be launched with, in this order, on a device that is made up."""
    launches = []

    def launch(function, *rest):
        *grid, shared, stream, at, _ = rest
        words, *maps = (ctypes.c_uint64 * 5).from_address(at)
        taken = 3 if function == "hopper_forward" else 4 if "hopper_backward" in function else 0
        maps = [ctypes.string_at(x, 128) for x in maps[:taken]]
        launches.append((function, grid, shared, ctypes.string_at(words, params.SIZE), maps))

    def encode(address, kind, rank, pointer, *rest):
        ctypes.memmove(address, struct.pack("qqq", kind, rank, pointer), 24)
        return 0

    def load(_, config):
        return device.Kernel(config.kernel, config.threads, config.shared_bytes, None)

    one, cupy = device.Device(0, 90, "sm_90a", 132), driver.cupy
    monkeypatch.setattr(device, "driver", types.SimpleNamespace(launchKernel=launch))
    monkeypatch.setattr(device.arguments, "bound", True)
    monkeypatch.setattr(driver, "load", load)
    monkeypatch.setattr(driver, "device_of", lambda number: one)
    monkeypatch.setattr(driver, "_plans", {})
    monkeypatch.setattr(driver, "_known", {})
    monkeypatch.setattr(tensor_maps, "_encode", lambda: encode)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: types.SimpleNamespace(ptr=7))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy.cuda.runtime, "memsetAsync", lambda *args: launches.append(args))
    return launches


def fake_call(cupy, start, dtype, shape, options, seed):
    """A forward and a backward of arrays that begin at `start`; the sizes of their workspace."""
    from fastattn.attention import attention_backward, attention_forward

    memory = Memory(start)
    with cupy.cuda.using_allocator(memory):
        Hq, Lq, Lk, D = shape
        q, k = cupy.ndarray((2, Hq, Lq, D), dtype), cupy.ndarray((2, Lk, 2, D), dtype)
        k, v = k.swapaxes(1, 2), cupy.ndarray((2, 2, Lk, D), dtype)
        given = {name: make(cupy) for name, make in options.items()}
        if "dropout_p" in given:
            given["seed"] = seed
        wrt = ["q", "k", "v", *(n for n in ("bias", "sinks", "alibi_slopes") if n in given)]
        memory.sizes.clear()
        out, lse = attention_forward(q, k, v, **given)
        attention_backward(q, q, k, v, out, lse, wrt=wrt, **given)
    return memory.sizes


FAKE_OPTIONS = {
    "none": {},
    "causal": {"is_causal": lambda cp: True, "scale": lambda cp: 0.5},
    "mask": {"attn_mask": lambda cp: cp.ndarray((2, 1, 300, 1100), np.bool_)},
    "bias": {"bias": lambda cp: cp.ndarray((8, 1, 1100), np.float32)},
    "dropout": {"dropout_p": lambda cp: 0.5},
    "lens": {
        "q_lens": lambda cp: cp.ndarray(2, np.int64), "kv_lens": lambda cp: cp.ndarray(2, np.int64)
    },
    "segments": {
        "q_segment_ids": lambda cp: cp.ndarray((2, 300), np.int64),
        "kv_segment_ids": lambda cp: cp.ndarray((2, 1100), np.int64),
    },
    "heads": {
        "sinks": lambda cp: cp.ndarray(8, np.float32),
        "alibi_slopes": lambda cp: cp.ndarray(8, np.float32), "softcap": lambda cp: 3.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", FAKE_OPTIONS)
def test_a_plan_is_filled_in_as_if_it_was_made_for_the_call(name, dtype, launches, driver):
    for shape in ((8, 300, 1100, 64), (8, 300, 1100, 40), (8, 1, 1100, 128)):
        options = FAKE_OPTIONS[name]
        if shape[1] == 1 and name in ("mask", "segments"):
            continue
        places = (0x7F0000000000, 0x7E1230000000)
        calls = [(driver.cupy, place, dtype, shape, options, place) for place in places]
        anew = []
        for call in calls:
            driver._plans.clear()
            driver._known.clear()
            launches.clear()
            sizes = fake_call(*call)
            anew.append((list(launches), sizes))
        assert anew[0][0] != anew[1][0] and anew[0][1] == anew[1][1]
        made = len(driver._plans)
        for call, expected in 2 * [*zip(calls, anew)]:
            launches.clear()
            sizes = fake_call(*call)
            assert (launches, sizes) == expected
        assert len(driver._plans) == made == 2
        assert any(driver._known.values()) == (name in ("none", "causal"))


def test_only_who_gives_up_an_order_gets_the_kernel_without_one(launches, driver):
    from fastattn.attention import attention_backward

    cupy = driver.cupy

    def kernels(D, wrt="qkv", dtype="float16", column=1, **options):
        with cupy.cuda.using_allocator(Memory(0x7F0000000000)):
            q, k = (cupy.ndarray((2, 4, 300, D * column), dtype)[..., ::column] for _ in range(2))
            lse = cupy.ndarray((2, 4, 300), np.float32)
            launches.clear()
            attention_backward(q, q, k, k, q, lse, wrt=tuple(wrt), **options)
        return [x[0] for x in launches if type(x[0]) is str]

    apart = [
        "backward_rows", "hopper_backward_q", "hopper_careful_q", "hopper_backward_kv",
        "hopper_careful_kv",
    ]  # fmt: skip
    together = [
        "backward_rows", "hopper_backward_qkv", "hopper_careful_kv", "hopper_finish_q",
        "hopper_careful_q",
    ]  # fmt: skip
    for D in (64, 40, 128):
        assert kernels(D) == kernels(D, deterministic=True) == apart
        assert kernels(D, deterministic=False) == kernels(D, "qk", deterministic=False) == together
    assert kernels(64, "q", deterministic=False) == apart[:3]
    assert kernels(64, "kv", deterministic=False) == [apart[0], *apart[3:]]
    for other in (dict(D=256), dict(D=64, column=2)):  # no such kernel; what no map describes
        assert kernels(**other, deterministic=False) == kernels(**other)
    found = kernels(64, softcap=3.0, deterministic=False)
    assert found == apart
    for D in (64, 128):  # float32 has one order only
        assert kernels(D, dtype="float32", deterministic=False) == [
            "backward_rows", "hopper_split", "hopper_halves_q", "hopper_careful_halves_q",
            "hopper_halves_kv", "hopper_careful_halves_kv",
        ]  # fmt: skip


def test_results_at_other_alignments_have_a_plan_of_their_own(launches, driver):
    from fastattn.attention import attention_forward

    cupy = driver.cupy
    with cupy.cuda.using_allocator(Memory(0x7F0000000000)):
        q, k, v = (cupy.ndarray((2, 4, 300, 64), np.float16) for _ in range(3))
        for _ in range(3):
            attention_forward(q, k, v)
    assert all(driver._known.values()) and len(driver._plans) == 1
    with cupy.cuda.using_allocator(Memory(0x7E0000000008)):
        out, _ = attention_forward(q, k, v)
    assert out.data.ptr % 16 == 8 and len(driver._plans) == 2


def test_what_is_known_is_known_by_all_that_it_depends_on(launches, driver):
    """Each change gives another result or error than the call that was done before it."""
    from fastattn import scaled_dot_product_attention
    from fastattn.attention import attention_forward

    cupy = driver.cupy
    with cupy.cuda.using_allocator(Memory(0x7F0000000000)):
        q, k, v = (cupy.ndarray((2, 4, 300, 64), np.float16) for _ in range(3))
        few = [cupy.ndarray((2, 2, 300, 64), np.float16) for _ in range(2)]

        def done(*arrays, function=attention_forward, **options):
            launches.clear()
            out = function(*arrays, **options)
            return launches[0][3], getattr(out, "out", out)

        for options in 2 * [{}, {"is_causal": True}, {"scale": 1.0}, {"causal_offset": 1}]:
            done(q, k, v, **options)
            done(q, k, v, function=scaled_dot_product_attention, **options)
        assert len(driver._known) == 8 and all(driver._known.values())
        for wrong in (
            {"is_causal": 1}, {"is_causal": None}, {"scale": True}, {"causal_offset": True},
            {"causal_offset": 1.0}, {"num_threads": 0}, {"seed": -1}, {"dropout_p": 0.5},
            {"attn_mask": object()}, {"kv_lens": [301, 0]}, {"kv_lens": 301}, {"softcap": -1.0},
        ):  # fmt: skip
            with pytest.raises((TypeError, ValueError)):
                attention_forward(q, k, v, **wrong)
        for _ in range(2):
            done(q, *few, function=scaled_dot_product_attention, enable_gqa=True)
        with pytest.raises(ValueError, match="enable_gqa"):
            scaled_dot_product_attention(q, *few)
        with pytest.raises(TypeError, match="enable_gqa"):
            scaled_dot_product_attention(q, *few, enable_gqa=1)
        with pytest.raises(ValueError, match="same length"):
            attention_forward(q, k, v[:, :, :200])
        for change in (
            lambda x: x[:, :, ::-1], lambda x: x.swapaxes(0, 1)[:2, :2], lambda x: x[:, :, :200],
            lambda x: x.view(np.int16).view("float16")[..., :32],
        ):  # fmt: skip
            changed = [change(x) for x in (q, k, v)]
            new = done(*changed)[0]
            done(*changed)
            assert new not in (done(q, k, v)[0], done(*changed, is_causal=True)[0])
            out = done(*changed)[1]
            assert out.shape == changed[0].shape
            again = done(*changed)[1]
            assert (again.shape, again.strides, again.dtype) == (out.shape, out.strides, out.dtype)
            assert again.data.ptr != out.data.ptr


def test_a_hopper_forward_of_float32_has_no_arrays_of_halves(launches, driver):
    """They are made in shared memory: workspace is what 16 bits need, flags and a counter."""
    from fastattn.attention import attention_forward

    cupy, sizes = driver.cupy, {}
    for dtype in (np.float16, np.float32):
        memory = Memory(0x7F0000000000)
        with cupy.cuda.using_allocator(memory):
            q, k, v = (cupy.ndarray((2, 4, 1000, 128), dtype) for _ in range(3))
            memory.sizes.clear()
            attention_forward(q, k, v)
        assert [x[0] for x in launches[-2:]] == ["hopper_forward", "hopper_careful"]
        sizes[dtype] = memory.sizes[2:]  # out and lse come first
    assert sizes[np.float32] == sizes[np.float16] and sum(sizes[np.float32]) < 4096
