"""Kernels for losses, and whether this machine can run them in Triton.

A family has three files: `NAME.py` has the call, the operator of torch and the checks of
arguments; `NAME_torch.py` a readable reference and the algorithm in torch; `NAME_triton.py`
the same algorithm in Triton, imported on the first call that it serves.

    stft_distance    distances of STFT magnitudes; also stft_plan, what a call computes, and
                     stft_torch, stft_torch_cells, stft_triton, stft_triton_{cells,waves,fft,gemm,tables}
    contrastive      distance to clean over distance to negatives, over feature layers
    info_nce         cross-entropy of a query's own key among all keys
    nearest_code     nearest code of a codebook          } both use frames_and_codes and
    token_loss       cross-entropy of frames and tokens  } frames_and_codes_triton
    gru              a recurrent layer with a short backward pass, on a CPU; cuDNN has it on a GPU

    backends         which back end serves a call        framing    frames of waves, and back
    launch           what Triton launchers share         workers    pieces of work on CPU cores
    resources        what each Triton kernel needs on a GPU, compiled ahead of time

Imports go from the call to its back ends, never back. Functions and classes that no other
module uses begin with `_`; constants and Triton functions do not. Needs torch alone; with
Triton and a GPU the same calls run there.
"""
# In a checkout this folder can be found under the name `kernels`, too, and transformers imports
# whatever has that name. A second copy would register the operators anew, and torch would free
# those of the first copy while they are in use. So under that name nothing is imported.
if __name__ == 'speechloss.kernels':
    from .backends import BACKENDS, available, why_not
    from .contrastive import contrastive_ratio, contrastive_terms
    from .info_nce import info_nce
    from .nearest_code import nearest_code
    from .stft_distance import Resolution, stft_distance
    from .token_loss import token_cross_entropy

    __all__ = ['BACKENDS', 'Resolution', 'available', 'contrastive_ratio', 'contrastive_terms', 'info_nce',
               'nearest_code', 'stft_distance', 'token_cross_entropy', 'why_not']
