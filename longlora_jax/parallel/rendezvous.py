"""Before jax joins the processes of a run: all come to one address, and say how many they think they are."""

import contextlib
import json
import socket
import time

from longlora_jax.errors import UserError


def roll_call(coordinator: str, num_processes: int, process_id: int, seconds: int) -> None:
    """Waits until all processes have come to the coordinator's address; jax would abort over one that is missing.

    Raises UserError, the same on all that came, if one is missing after so many seconds, if they disagree about
    their number, or if two have one id.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} is not HOST:PORT: name the host of process 0 and a free port there"
        )
    if process_id:
        fault = _answer(host.strip("[]"), int(port), [process_id, num_processes], seconds)
    else:
        fault = _call(int(port), num_processes, seconds)
    if fault:
        raise UserError(
            f"{fault}: start each process with the same --coordinator and --num_processes and its own --process_id"
        )


def _call(port: int, num_processes: int, seconds: int) -> str:
    """Process 0's part of the roll call. Returns what is wrong, "" if all have come."""
    fault, came, deadline = "", {0}, time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=dual))
        except OSError as error:
            raise UserError(
                f"port {port} cannot be opened ({error.strerror}): give --coordinator another one"
            ) from error
        guests = []
        while len(came) < num_processes and not fault:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                guest = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(num_processes) if i not in came)
                fault = f"of {num_processes} processes, {missing} did not come within {seconds} seconds"
                break
            try:
                guest.settimeout(5)
                theirs, count = json.loads(guest.makefile().readline(100))
            except (OSError, ValueError, TypeError):
                continue  # somebody else
            guests.append(guest)
            if count != num_processes:
                fault = f"process {theirs} was given --num_processes={count}, process 0 {num_processes}"
            elif theirs in came:
                fault = f"two processes have --process_id={theirs}"
            came.add(theirs)
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.sendall(f"{fault}\n".encode())
                guest.recv(1)  # it hangs up first, so that the port is free for jax
    return fault


def _answer(host: str, port: int, me: list[int], seconds: int) -> str:
    """Another process's part of the roll call. Returns what is wrong, "" if all have come."""
    deadline, reason = time.monotonic() + seconds, "no answer"
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as server:
                server.sendall(f"{json.dumps(me)}\n".encode())
                server.settimeout(seconds + 5)
                if line := server.makefile().readline():
                    return line.strip()
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"process 0 was not reached at {host}:{port} within {seconds} seconds ({reason}): start it there with "
                "the same --coordinator, on a port that is open between the hosts"
            )
        time.sleep(0.2)
