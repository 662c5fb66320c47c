"""Lists the configs and architectures that come with the project.

automoe configs

`--config quickstart` and `--subnet transformer_base` find them by name, with or without a clone.
"""

from automoe_jax.architecture import counts
from automoe_jax.cli import options, terminal
from automoe_jax.published import subnet_files
from automoe_jax.system import shipped

_JSON = options.define_json()


def main():
    configs = {path.stem: shipped.first_line(path) for path in shipped.configs()}
    subnets = {}
    for path in shipped.subnets():
        counted = counts.count(subnet_files.load(path))
        subnets[path.stem] = {
            "params_m": counted.params / 1e6,
            "active_params_m": counted.active_params / 1e6,
            "gflops": counted.flops / 1e9,
        }
    if _JSON.value:
        terminal.print_json({"folder": str(shipped.FOLDER), "configs": configs, "subnets": subnets})
        return
    terminal.print_table(("config", "what it is"), configs.items())
    header = ("subnet", "params M", "active M", "GFLOPs")
    rows = ((name, *(f"{x:.4g}" for x in row.values())) for name, row in subnets.items())
    terminal.print_table(header, rows)
    print(f"files: {shipped.FOLDER}")
