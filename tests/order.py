"""The order of all files: a file imports only from files above it.

It is also the reading order of the hall. Files of rooms stand where the import order needs them.
test_house.py checks the list.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

ORDER = """
config.py masks.py rope.py sink_tokens.py plumbing/contents.py plumbing/texts.py plumbing/files.py
kernel/library.py kernel/cache_append_attention.py kv_cache.py model.py rollout.py
plumbing/cli.py plumbing/stopwatch.py plumbing/browser.py
toy/world.py toy/codec.py toy/decoder.py toy/detectors.py toy/switch.py
film/decoders.py film/mp4.py film/writer.py film/sheet.py film/page.py film/passes.py
film/filming.py film/live.py film/prompt_list.py film/picture.py toy/faster.py
toy/source.py generate.py toy/training.py
plumbing/processes.py plumbing/trainer.py plumbing/stages.py toy/fit.py
teacher.py dmd.py ode_regression.py self_forcing.py
full_size/fp8.py full_size/checkpoint.py full_size/parts.py full_size/hub.py
full_size/weights.py full_size/text.py full_size/decoders.py full_size/sharding.py
full_size/memory.py full_size/faster.py full_size/source.py
studies/plots.py studies/evaluate.py studies/compare.py studies/ablations.py
studies/image.py studies/refresh.py studies/pasts.py studies/first_teachers.py
studies/prompt_switch.py studies/live.py studies/fp8.py studies/reproduce.py
benchmarks/page.py benchmarks/bench_attention.py benchmarks/bench_generate.py
benchmarks/bench_decode.py benchmarks/bench_toy.py benchmarks/training_memory.py
benchmarks/newcomer.py
plumbing/rename.py
exercises/behind.py exercises/coursework.py exercises/grader.py exercises/classroom.py
exercises/handout.py exercises/reward.py exercises/leaderboard.py exercises/__main__.py conftest.py
""".split()


def imports_of(path, in_functions=True) -> set[str]:
    """Return the project files that a file imports, e.g. {"config.py", "toy/world.py"}.

    in_functions   False: leave out imports inside functions, which only a call executes
    """
    modules = set()
    for node in _nodes(ast.parse((ROOT / path).read_text()), in_functions):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from toy import world` names a file, `from toy.world import render` a function in it
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    files = {module.replace(".", "/") + ".py" for module in modules}
    return {file for file in files if (ROOT / file).is_file()}


def _nodes(tree, in_functions):
    for node in ast.iter_child_nodes(tree):
        if in_functions or not isinstance(node, ast.FunctionDef):
            yield node
            yield from _nodes(node, in_functions)
