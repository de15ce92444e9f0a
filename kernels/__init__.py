"""Kernels for the losses that are worth one, and whether this machine can run them.

Each family is a module of its own: the call, a readable reference, and its algorithm in
torch; the Triton back end lies beside it in `*_triton*.py` and is imported when it is to
serve. Needs torch alone; with Triton and a GPU the same calls run there.
"""
# In a checkout this folder can be found under the name `kernels`, too, and transformers imports
# whatever bears that name. A second copy would register the operators anew, and torch would free
# those of the first one under the feet of its callers. So under that name there is nothing here.
if __name__ == 'speechloss.kernels':
    from .backends import BACKENDS, available, why_not
    from .contrastive import contrastive_ratio, contrastive_terms
    from .info_nce import info_nce
    from .nearest_code import nearest_code
    from .stft_distance import Resolution, stft_distance
    from .token_loss import token_cross_entropy

    __all__ = ['BACKENDS', 'Resolution', 'available', 'contrastive_ratio', 'contrastive_terms', 'info_nce',
               'nearest_code', 'stft_distance', 'token_cross_entropy', 'why_not']
