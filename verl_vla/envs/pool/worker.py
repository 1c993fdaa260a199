"""The process around one environment: ``python -m verl_vla.envs.pool.worker SOCKET FRAMES``.

It keeps no episode between requests. Each `StepChunk` holds the snapshot that it starts from, so
any worker can serve any slot. The process ends on a `Stop`, after its environment has raised, and
when the pool is gone, even if the pool was killed.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import Observation
from verl_vla.core.errors import ConfigError, ContractError, EpisodeCrashed
from verl_vla.envs.base import Env, Snapshot
from verl_vla.envs.pool.messages import (
    STACK_SIGNAL,
    Failed,
    Frames,
    Moment,
    Ready,
    Reply,
    Request,
    Setup,
    Started,
    StartEpisode,
    Stepped,
    Stop,
    map_frames,
)

ORPHAN_GRACE_S = 5.0
"""Time that a worker has to finish a request after its pool is gone, s."""


def main(socket_descriptor: int, frames_descriptor: int) -> None:
    """Serve a pool until it sends `Stop` or is gone."""
    faulthandler.enable()  # a segmentation fault writes its Python stack to the output
    faulthandler.register(STACK_SIGNAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool, which then sends Stop
    for descriptor in (socket_descriptor, frames_descriptor):
        os.set_inheritable(descriptor, False)  # else a child would keep the socket open
    threading.Thread(target=_follow_pool, args=(socket_descriptor,), daemon=True).start()
    # a copy: the original stays open, so the pool sees the hang-up only when the process has ended
    connection = Connection(os.dup(socket_descriptor))
    setup: Setup = connection.recv()
    frames = map_frames(frames_descriptor, setup.frames_shape)
    env = _make_env(setup, connection)
    if env is not None:
        connection.send(Ready())
        _serve(env, frames, connection)
        env.close()


def _make_env(setup: Setup, connection: Connection) -> Env | None:
    try:
        return pickle.loads(setup.factory)()
    except ConfigError as error:
        connection.send(Failed(error=error))
    except Exception:  # noqa: BLE001 -- process boundary: the cause must reach the pool
        reason = f"the environment cannot be made:\n{traceback.format_exc()}"
        connection.send(Failed(error=EpisodeCrashed(reason)))
    return None


def _serve(env: Env, frames: Frames, connection: Connection) -> None:
    while True:
        try:
            request: Request | Stop = connection.recv()
        except EOFError:
            return
        if isinstance(request, Stop):
            return
        reply = _reply(env, frames, request)
        connection.send(reply)
        if isinstance(reply, Failed) and isinstance(reply.error, EpisodeCrashed):
            return


def _reply(env: Env, frames: Frames, request: Request) -> Reply:
    try:
        return _do(env, frames, request)
    except (ConfigError, ContractError) as error:
        # the caller's mistake, and the simulator is sound: the process stays
        return Failed(error=type(error)(f"{request}: {error}"))
    except Exception:  # noqa: BLE001 -- process boundary: the cause must reach the pool
        return Failed(error=EpisodeCrashed(f"{request}: it raised\n{traceback.format_exc()}"))


def _do(env: Env, frames: Frames, request: Request) -> Reply:
    began = time.perf_counter()
    frame = frames[request.slot]
    if isinstance(request, StartEpisode):
        observation = env.reset(request.task_id, request.init_state_id)
        moment = _moment(env, observation, frame)
        return Started(moment=moment, busy_s=time.perf_counter() - began)
    snapshot: Snapshot = pickle.loads(request.snapshot)
    env.restore(snapshot)
    result = env.step_chunk(request.actions)
    if (result.observation is None) != (result.outcome is not None):
        raise ContractError("an observation must come with every chunk but the last")
    moment = None if result.observation is None else _moment(env, result.observation, frame)
    if result.final_image is not None:
        # an ended episode has no observation, so its frame is free
        _show(result.final_image, frame)
    return Stepped(
        executed=result.executed,
        outcome=result.outcome,
        moment=moment,
        has_final_image=result.final_image is not None,
        video=result.video,
        goals=result.goals,
        busy_s=time.perf_counter() - began,
    )


def _moment(env: Env, observation: Observation, frame: Frames) -> Moment:
    _show(observation.image, frame)
    return Moment(
        # as bytes: the pool passes it on, and needs nothing of the simulator to do so
        snapshot=pickle.dumps(env.snapshot(), protocol=pickle.HIGHEST_PROTOCOL),
        proprio=observation.proprio,
        instruction=observation.instruction,
    )


def _show(image: npt.NDArray[np.uint8], frame: Frames) -> None:
    if image.shape != frame.shape or image.dtype != np.uint8:
        raise ContractError(
            f"the environment's image is {image.dtype} {list(image.shape)}, but the pool was made "
            f"for uint8 {list(frame.shape)}; give both the same views and image size"
        )
    frame[...] = image


def _follow_pool(socket_descriptor: int) -> None:
    """End this process once the pool is gone, even when a simulator never returns."""
    poll = select.poll()
    poll.register(socket_descriptor, 0)  # nothing but the hang-up, which is always reported
    poll.poll()
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
