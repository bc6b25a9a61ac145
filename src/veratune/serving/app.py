"""The server as a whole: create_server builds all parts from a ServeConfig."""

import contextlib
import functools
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from veratune.formats.hub import download, is_address
from veratune.serving.config import ServeConfig
from veratune.serving.engine.threads import run_in_temporary_thread
from veratune.serving.feedback.feedback import Feedback
from veratune.serving.feedback.repository import FILE, FeedbackRepository
from veratune.serving.feedback.trainer import FeedbackTrainer
from veratune.serving.http.app import check_address, create_app
from veratune.serving.http.server import HttpServer, bind
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.jobs.models import Setting, TrainableModel
from veratune.serving.jobs.servable import check_servable
from veratune.serving.keys import OPEN, Keys
from veratune.serving.load import load_encoder, load_engine
from veratune.serving.logs import log_json
from veratune.serving.routing.training import embed_feedback, embed_training_file
from veratune.serving.service import Service
from veratune.serving.store.base import Store
from veratune.serving.store.cached import CachedStore
from veratune.serving.store.object import ObjectStore
from veratune.serving.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)


class Server:
    """One server, ready to run: engines, store, jobs and the HTTP application."""

    def __init__(self, config: ServeConfig, listener: socket.socket, keys: Keys) -> None:
        """Load the models. Raises VeratuneError."""
        self.config, self.listener = config, listener
        # A thread that computed once keeps an OpenMP pool that slows the engines' own threads.
        self.service = run_in_temporary_thread(lambda: create_service(config))
        self.jobs = _create_jobs(config, self.service)
        self.feedback = _create_feedback(config, self.service, self.jobs)
        self.app = create_app(self.service, keys, self.jobs, config.http(), self.feedback)

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        for loop in self.service.loops.values():
            loop.start()
        if self.jobs is not None:
            self.jobs.start()
        if self.feedback is not None:
            self.feedback.start()
        _log_start(self.config, list(self.service.loops), self.url)
        try:
            # uvicorn raises a signal that ended it once more, unless it is handled here.
            with contextlib.suppress(KeyboardInterrupt):
                HttpServer(
                    self.app,
                    self.service,
                    shutdown_timeout=self.config.shutdown_timeout,
                    header_timeout=self.config.http().header_timeout,
                ).run(sockets=[self.listener])
        finally:
            self.service.close()
            if self.feedback is not None:
                self.feedback.close()
            if self.jobs is not None:
                self.jobs.close()
            self.service.store.close()


def create_server(config: ServeConfig) -> Server:
    """Build a server. The address is taken before the models are loaded.

    Args:
        config: Its settings.

    Raises:
        ConfigError: The address cannot be had, or a setting is wrong.
        UnsupportedError: Other machines could reach a server without keys.
    """
    keys = Keys(config.key_file)
    check_address(config.host, keys)
    listener = bind(config.host, config.port)
    log_json()
    return Server(config, listener, keys)


def run_replicas(config: ServeConfig) -> None:
    """Run several servers behind one address by Ray Serve, until SIGTERM or SIGINT."""
    from veratune.serving import cluster

    check_address(config.host, Keys(config.key_file))
    with bind(config.host, config.port) as listener:
        port = listener.getsockname()[1]
    log_json()
    log.info("starting %d replicas", config.replicas)
    cluster.start(
        functools.partial(_create_replica, config),
        replicas=config.replicas,
        host=config.host,
        port=port,
        key_file=config.key_file,
        max_num_seqs=config.max_num_seqs,
        max_queue=config.max_queue,
    )
    names = [Path(given).name for given in (config.model, config.encoder) if given]
    _log_start(config, names, f"http://{config.host}:{port}")
    cluster.wait()


def create_service(config: ServeConfig) -> Service:
    """Load the models, open the store, and publish the adapters that were given.

    Args:
        config: The server's settings.

    Returns:
        The service; its engines do not run yet.
    """
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    store: Store
    if "://" in config.store:
        cache = SqliteStore(config.cache)
        store = CachedStore(ObjectStore.from_url(config.store), cache, config.refresh_seconds)
    else:
        store = SqliteStore(config.store)
    service = Service(
        store,
        load_engine(config) if config.model is not None else None,
        load_encoder(config) if config.encoder is not None else None,
        served_model_name=config.served_model_name,
        served_encoder_name=config.served_encoder_name,
        refresh_seconds=config.refresh_seconds,
    )
    for name, file in config.adapter_files():
        path = download(file) if is_address(file) else Path(file)
        service.put_if_changed(OPEN.tenant, name, path.read_bytes())
    return service


def _create_jobs(config: ServeConfig, service: Service) -> Jobs | None:
    if config.jobs is None:
        return None
    models = {}
    for name, loop in service.loops.items():
        if loop is service.engine and config.model is not None:
            columns: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"))
            models[name] = TrainableModel(
                config.model, "instruction", columns, embed_training_file(service.require_router())
            )
        elif config.encoder is not None:
            models[name] = TrainableModel(
                config.encoder, "text-classification", (("text", "label"),)
            )
    return Jobs(
        config.jobs,
        models,
        service.put_if_changed,
        check_settings=functools.partial(check_servable, service.loops),
        max_jobs_per_tenant=config.max_jobs_per_tenant,
    )


def _create_feedback(config: ServeConfig, service: Service, jobs: Jobs | None) -> Feedback | None:
    if jobs is None or config.jobs is None or config.model is None:
        return None
    folder = Path(config.jobs)
    repository, trainer = FeedbackRepository(folder / FILE), None
    if config.train_after:
        flags: dict[str, Setting] = {
            "feedback": str(repository.path),
            "store": config.store,
            "model": config.model,
        }
        if config.feedback_config is not None:
            flags["config"] = config.feedback_config
        trainer = FeedbackTrainer(
            repository,
            folder / "feedback",
            flags,
            config.train_after,
            on_published=embed_feedback(service.require_router()),
        )
    return Feedback(repository, service, jobs, trainer)


def _create_replica(config: ServeConfig) -> "tuple[Service, FastAPI]":
    """One of several servers, in a process of its own."""
    log_json()
    service = create_service(config)
    return service, create_app(service, Keys(config.key_file), None, config.http())


def _log_start(config: ServeConfig, names: list[str], url: str) -> None:
    who = f"keys in {config.key_file}" if config.key_file else "no keys"
    log.info(
        "%s on %s (API under /v1), adapters in %s, %s", ", ".join(names), url, config.store, who
    )
