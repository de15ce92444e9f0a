"""`variants`, `compiled`, `wrong`: what each shipped Triton kernel needs, compiled ahead of time without a GPU.

    python -m speechloss.kernels.resources

prints registers, stack (spills) and shared memory of every entry of the tile tables on
compute capability 8.0, 9.0 and 10.0.
"""
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

FAMILIES = ('stft_triton', 'contrastive_triton', 'info_nce_triton', 'nearest_code_triton',
            'token_loss_triton')
CAPABILITIES = (80, 90, 100)
#: A kernel with fewer registers is an empty one: the compiler can fail without a word
REGISTERS = 8
#: Shared memory that a block may use, bytes
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Variant(NamedTuple):
    "One entry of a tile table: what the launcher would compile"
    name: str                   # for people
    kernel: Any                 # the @triton.jit function
    signature: dict[str, str]   # argument -> '*fp32', 'i32', ... ; 'constexpr' for the constants
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    spill: int = 0              # bytes of stack that this entry is known to need
    fp_fusion: bool = True      # whether products and sums may be contracted


def variant(
    name: str,
    kernel: Any,                               # the @triton.jit function
    constants: dict[str, Any],                 # of the arguments in capitals
    types: dict[str, str] | None = None,       # of arguments, where their names do not give them
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    fp_fusion: bool = True,
) -> Variant:
    "Make an entry of a tile table; without a type, NAME_ptr is '*fp32' and another argument 'i32'"
    types = dict.fromkeys(constants, 'constexpr') | {k: v for k, v in (types or {}).items() if k not in constants}
    signature = {name: types.get(name, '*fp32' if name.endswith('_ptr') else 'i32') for name in kernel.arg_names}
    return Variant(name, kernel, signature, constants, num_warps, num_stages, fp_fusion=fp_fusion)


class Use(NamedTuple):
    "What a compiled kernel needs"
    registers: int
    stack: int     # bytes; above 0 means spills
    shared: int    # bytes


def variants(families: Sequence[str] = FAMILIES) -> list[Variant]:
    "Return the tile tables of kernel families"
    return [variant for family in families for variant in import_module(f'.{family}', __package__).VARIANTS]


def compiled(variant: Variant, capability: int) -> Use:
    "Compile one variant for a capability and read what it needs off the binary"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = list(variant.signature)
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    # as the launcher does: pointers from torch are aligned to 16 bytes
    aligned = {(k,): [['tt.divisibility', 16]] for k, kind in enumerate(variant.signature.values())
               if kind.startswith('*')}
    source = ASTSource(fn=variant.kernel, signature=variant.signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget('cuda', capability, 32),
                            options=dict(num_warps=variant.num_warps, num_stages=variant.num_stages,
                                         enable_fp_fusion=variant.fp_fusion))
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(kernel.asm['cubin'])
        file.flush()
        text = subprocess.check_output([tool, '-res-usage', file.name], text=True)
    use = {name: int(value) for name, value in re.findall(r'(REG|STACK):(\d+)', text)}
    return Use(use['REG'], use['STACK'], kernel.metadata.shared)


def wrong(variant: Variant, capability: int, use: Use) -> bool:
    "Return whether a variant spills, asks for more shared memory than there is, or was compiled to nothing"
    return use.stack > variant.spill or use.shared > SHARED[capability] or use.registers < REGISTERS


def main() -> int:
    "Print the table of all variants; return 1 when something is wrong with one of them, else 0"
    bad = 0
    print(f'{"kernel":44} sm  registers  stack  shared')
    for variant in variants():
        for capability in CAPABILITIES:
            use = compiled(variant, capability)
            bad += (failed := wrong(variant, capability, use))
            print(f'{variant.name:44} {capability:3} {use.registers:9} {use.stack:6} {use.shared:7}'
                  f'{"  <- wrong" if failed else ""}', flush=True)
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
