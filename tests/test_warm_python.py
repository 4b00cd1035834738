"""The Python that tests start does what Python does."""

import subprocess
import sys
import time

import pytest

PROGRAMS = {
    "arguments": "import os, sys; print(sys.argv, __name__)",
    "place": "import os, sys; print(sys.path[0] == '', os.getcwd(), os.environ['HOME'])",
    "streams": "import sys; print(sys.stdin.read()); print('no', file=sys.stderr)",
    "status": "import sys; sys.exit(3)",
    "traceback": "1 / 0",
    "signal": "import os; os.kill(os.getpid(), 9)",
    "nothing of ours": "import sys; print('vitreg_hub' in sys.modules, 'tests' in sys.path[-1])",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_does_what_python_does(program, warm_python, tmp_path):
    usual, warm = (
        subprocess.run(
            [python, "-c", PROGRAMS[program], "a"], input="given", cwd=tmp_path, capture_output=True, text=True
        )
        for python in (sys.executable, warm_python.executable)
    )
    assert (warm.returncode, warm.stdout) == (usual.returncode, usual.stdout)
    assert warm.stderr.splitlines()[-1:] == usual.stderr.splitlines()[-1:]


def test_a_process_ends_with_the_program_that_asked_for_it(warm_python, tmp_path):
    code = f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(2); open({str(tmp_path / 'done')!r}, 'w')"
    program = subprocess.Popen([warm_python.executable, "-c", code])
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    program.kill()
    program.wait()
    time.sleep(2.5)
    assert not (tmp_path / "done").exists()
