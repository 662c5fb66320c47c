"""XLA flags for tests, which compile far more than they run."""

import importlib.metadata

# Code generation at level 0, without the passes that take longest: 0.6 of the time to compile.
# In one part, not 32: two workers leave no core for more, and splitting takes a tenth of the time.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.11 has no such flag
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
