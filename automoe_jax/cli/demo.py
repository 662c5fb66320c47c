"""Serves a page on this machine that translates what one types, with one export or several.

python launch/demo.py --export=runs/quickstart/export
python launch/demo.py --export=A --export=B        # side by side

The page shows translations with scores, milliseconds, and which expert of each layer every token
is sent to. Needs Flask and waitress: pip install flask waitress.
"""

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.decoding.translator import Translator
from automoe_jax.demo import app as web
from automoe_jax.demo.models import DemoModel
from automoe_jax.system import files, malloc
from automoe_jax.system.errors import UserError

_EXPORTS = options.define_exports()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on: this machine alone")
_PORT = flags.DEFINE_integer("port", 8123, "port; 0 for any that is free", lower_bound=0,
                             upper_bound=65535)  # fmt: skip
_KERNELS = options.define_kernels()


def main():
    exports = options.exports(_EXPORTS)
    web.check_installed()
    malloc.return_large_blocks()
    progress = terminal.TerminalProgress()
    models = []
    for path in exports:
        folder = files.expanded(path)
        translator = Translator.load(folder, kernels=_KERNELS.value, release_memory=malloc.trim)
        progress.note(f"loaded {path}; compiling what a first sentence needs")
        models.append(DemoModel(path, translator))
    if not set.intersection(*(set(model.about["beam_sizes"]) for model in models)):
        raise UserError(f"{', '.join(exports)} have no beam size in common; export them alike")
    host = _HOST.value
    # Who listens to the network is called by names that nobody knows here.
    hosts = web.LOCAL if host in web.LOCAL else ()
    server = web.listen(web.make_app(models, hosts), host, _PORT.value)
    print(f"{web.address(server)} (Ctrl-C ends it)", flush=True)
    server.run()
