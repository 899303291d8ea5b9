"""flashspark inside vLLM: attention that vLLM would run on FlashAttention runs on flashspark's kernels on SM12x.

Nothing has to be called. There are two ways in, either of which is enough: the start-up hook (flashspark.pth, see
flashspark._hook) and vLLM's plug-in group ``vllm.general_plugins``, whose entry point is `register`.

======================  ==============================================================================================
``takeover``            decides whether this process is taken over, and does it
``features``            what the kernels can do: the one table that every answer to vLLM comes from
``switches``            the environment variables
``names``               names of vLLM's modules
``sites``               the table of vLLM's functions that are replaced, and by what
``attention``           the replacements of attention calls
``gates``               the replacements of questions about versions and dtypes
``mod_factories``       the replacements of factories of mask and score functions
``warmups``             the replacements of what compiles FlashAttention 4 at start-up
``replace``             puts replacements in, finds every copy of the original, takes them out again
``backend``             the subclass of vLLM's FlashAttention backend on the FLASH_ATTN slot
``scheduler_metadata``  what the backend's builder finds once a step for all layers
``probe``               whether the installed vLLM has the shape that all this relies on
``versions``            the table of releases; ``python -m flashspark.vllm.versions`` prints it
``doctor``              ``flashspark doctor``'s section about vLLM
``verify``              ``flashspark verify --vllm``
``report``              what the log says
======================  ==============================================================================================

FLASHSPARK=0 or FA4_SM120_SHIM=0 leaves vLLM as it is. FLASHSPARK_CAPABILITIES=9.0,12.x names the compute capabilities
to take over (default: 12.x).
"""

from __future__ import annotations


def register() -> None:
    """vLLM's plug-in: arms the hook for modules not loaded yet, and takes over those that are. Never raises."""
    from flashspark import _hook

    from . import report, takeover

    try:
        _hook.install()
        takeover.start(_hook.switched_off())
    except Exception:
        report.exception("the plug-in failed; vLLM keeps its own attention")
