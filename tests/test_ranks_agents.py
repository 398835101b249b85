"""Phase B as torchrun starts it on two machines."""
import signal
import socket
import time

import toy_phase_a
from killed_runs import comparable, said, start, wait
from nanochat_cl import runs
from tests import toy_pretraining as toy

RESET = "--optimizer", "reset"  # the toy's Phase A has optimizer state for one rank


def test_two_agents_as_on_two_machines_stop_on_sigterm_with_their_state_and_end_as_two_processes_do(tmp_path):
    with toy_phase_a.base_directory(tmp_path) as base:
        assert wait(start("alone", base, *RESET, ranks=2)) == [0, 0], said(base, "alone")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        agents = [toy.torchrun(base, "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
                               "-m", "nanochat_cl.evolve", "--", *toy_phase_a.ARGS, "--name", "agents", *RESET) for node in range(2)]
        folder = base / "evolve" / "agents"
        while not runs.saved_steps(folder):
            assert not any(agent.poll() for agent in agents), "".join(agent.communicate()[0] for agent in agents)
            time.sleep(0.02)
        agents[1].send_signal(signal.SIGTERM)  # all ranks stop, whichever machine hears of it
        said_by = [agent.communicate()[0] for agent in agents]
        assert all(agent.returncode for agent in agents), said_by
        assert all("nanochat_cl.evolve: terminated; the same command continues" in lines for lines in said_by), said_by
        assert "exitcode  : 143" in said_by[0], said_by[0]
        assert wait(start("agents", base, *RESET, ranks=2)) == [0, 0], said(base, "agents")
        assert comparable(base, "agents") == comparable(base, "alone")
