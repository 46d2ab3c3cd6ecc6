"""Where the parts of a layer's step run. The only folder that knows of more than one place."""

from magicpig.placement.accelerator import Accelerated
from magicpig.placement.base import LayerStep, Placement, Rule, Stepped
from magicpig.placement.cpu import CPU, Cpu
from magicpig.placement.gpu_index import GpuIndex
from magicpig.placement.host import Host

__all__ = ["CPU", "Accelerated", "Cpu", "GpuIndex", "Host", "LayerStep", "Placement", "Rule", "Stepped"]
