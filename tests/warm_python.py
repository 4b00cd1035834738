"""Python that starts at once: processes that are forked off one which has imported the libraries, but nothing of ours.

Importing torch, timm and transformers takes seconds, and many tests start commands that do. Where the import itself is
not what a test is about, `WarmPython.executable` stands for `sys.executable`: a program that hands its arguments,
environment and streams to the server below, whose fork then does what Python would.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from importlib import import_module, reload
from pathlib import Path
from types import ModuleType

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
    "transformers.models.timm_wrapper.image_processing_timm_wrapper",
    "transformers.masking_utils",
    "transformers.generation.continuous_batching",
    "pydantic",
    "matplotlib.pyplot",
    "sklearn.linear_model",
)

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(asked)
    code = int(server.recv(8) or b"1")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class WarmPython:
    """A server, and beside each other in a folder the programs `python` and `vitreg` that it runs.

    Where there are no such processes, which is elsewhere than on Linux, they are the usual ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.executable = folder / "python"
        self._server: subprocess.Popen | None = None

    def __enter__(self) -> "WarmPython":
        if sys.platform != "linux":
            self.executable.symlink_to(sys.executable)
        else:
            address = str(self.folder / "socket")
            ready, told = os.pipe()
            command = [sys.executable, "-P", __file__, address, str(self.executable), str(told)]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[told])
            os.close(told)
            self._write(self.executable, CLIENT.format(python=sys.executable, address=address))
            with open(ready, "rb") as pipe:
                assert pipe.read(), "the server has not started"
        self._write(self.folder / "vitreg", f'#!/bin/sh\nexec "{self.executable}" -P -m vitreg_hub "$@"\n')
        return self

    def __exit__(self, *raised: object) -> None:
        if self._server is not None:
            self._server.communicate()  # closes its standard input, at which it ends

    @staticmethod
    def _write(program: Path, text: str) -> None:
        program.write_text(text)
        program.chmod(0o755)


def serve(address: str) -> list[str]:
    """Fork a process for each request. Returns its command line in that process, and never in the server."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(int(sys.argv[3]), b"ready")
        os.close(int(sys.argv[3]))
        attending: list[int] = []
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            attending = [process for process in attending if not os.waitpid(process, os.WNOHANG)[0]]
            attending.append(os.fork())
            if not attending[-1]:
                break
            connection.close()
        else:
            sys.exit()
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as sent:
        argv, folder, environment = json.loads(sent.read(int.from_bytes(size, "big")))
    if process := os.fork():
        attend(connection, process)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    reload(import_module("huggingface_hub.constants"))  # read from the environment
    return argv


def attend(connection: socket.socket, process: int) -> None:
    """Tell the program how its process ended; when the program ends first, it was killed, and so is its process."""
    running = os.pidfd_open(process)
    if connection in select.select([connection, running], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        connection.sendall(str(code).encode())
    finally:
        os._exit(0)


def run(arguments: list[str]) -> None:
    """What Python does with these arguments."""
    options = []
    while arguments[0] in ("-P", "-u"):
        options.append(arguments.pop(0))
    if "-u" in options:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    kind = arguments.pop(0) if arguments[0] in ("-c", "-m") else "file"
    code, sys.argv = arguments[0], [arguments[0] if kind == "file" else kind, *arguments[1:]]
    if code.startswith("-"):
        raise NotImplementedError(f"{code} is not understood here: take sys.executable")
    if "-P" not in options:
        first = {"-c": "", "-m": os.getcwd(), "file": str(Path(code).resolve().parent)}
        sys.path.insert(0, first[kind])
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    elif kind == "file":
        runpy.run_path(code, run_name="__main__")
    else:
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    for library in LIBRARIES:
        import_module(library)
    gc.freeze()  # or every process would look through all that has been imported, and so copy it, when it ends
    arguments = serve(sys.argv[1])[1:]
    sys.executable = sys.argv[2]
    run(arguments)
