"""Rendezvous of a run's processes, before jax.distributed: all connect to process 0 and state their id and number.

Ours because jax.distributed aborts a process in C++ where one is missing, or where they were given different numbers.
"""

import contextlib
import json
import socket
import time

from longlora_jax.errors import UserError


def rendezvous(coordinator: str, num_processes: int, process_id: int, seconds: int) -> None:
    """Waits until all processes have connected to the coordinator's address.

    Raises UserError, the same in all that connected, if one is missing after so many seconds, if they disagree about
    their number, or if two have one id.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} is not HOST:PORT: name the host of process 0 and a free port there"
        )
    if process_id:
        fault = _connect(host.strip("[]"), int(port), [process_id, num_processes], seconds)
    else:
        fault = _serve(int(port), num_processes, seconds)
    if fault:
        raise UserError(
            f"{fault}: start each process with the same --coordinator and --num_processes and its own --process_id"
        )


def _serve(port: int, num_processes: int, seconds: int) -> str:
    """Process 0 accepts the others and sends each the outcome. Returns what is wrong, "" if all have connected."""
    fault, ids, deadline = "", {0}, time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=dual))
        except OSError as error:
            raise UserError(
                f"port {port} cannot be opened ({error.strerror}): give --coordinator another one"
            ) from error
        clients = []
        while len(ids) < num_processes and not fault:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                client = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(num_processes) if i not in ids)
                fault = f"of {num_processes} processes, {missing} did not come within {seconds} seconds"
                break
            try:
                client.settimeout(5)
                client_id, count = json.loads(client.makefile().readline(100))
            except (OSError, ValueError, TypeError):
                continue  # not a process of this run
            clients.append(client)
            if count != num_processes:
                fault = f"process {client_id} was given --num_processes={count}, process 0 {num_processes}"
            elif client_id in ids:
                fault = f"two processes have --process_id={client_id}"
            ids.add(client_id)
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(f"{fault}\n".encode())
                client.recv(1)  # the client closes first, so that the port is free for jax
    return fault


def _connect(host: str, port: int, me: list[int], seconds: int) -> str:
    """Another process states [its id, its number] and waits for the outcome: what is wrong, "" if nothing is."""
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
