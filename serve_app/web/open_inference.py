"""Health and metadata of the Open Inference Protocol, version 2, for KServe, Triton's clients and
gateways that speak it.

Its `infer` is not here: a user's history is no tensor. Requests go to `/v1/rank`.
"""

from typing import Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from pipeline.version import package_version
from serve_app.schemas import ModelInfo, Problem
from serve_app.web.monitoring import ask_in_time
from serve_app.web.replica import RunningReplica
from serve_app.web.responses import NO_MODEL, PROTECTED, Responses

NO_SUCH: Responses = {404: {"model": Problem, "description": "no model of that name answers"}}

router = APIRouter(tags=["open inference protocol"])
open_router = APIRouter(tags=["open inference protocol"])  # routes without a key


class ServerMetadata(BaseModel):
    """The server, as the protocol says it."""

    name: str = "ultra-hstu-pipeline"
    version: str
    extensions: list[str] = Field(default_factory=list)


class ServerLive(BaseModel):
    live: Literal[True] = True


class ServerReady(BaseModel):
    ready: Literal[True] = True


class ModelReady(BaseModel):
    name: str
    ready: Literal[True] = True


class TensorMetadata(BaseModel):
    """A column of a rank request, or of its answer; -1 in the shape is any number."""

    name: str
    datatype: Literal["INT64", "INT32", "FP32", "BYTES"]
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model, as the protocol says it."""

    name: str
    versions: list[str] = Field(description="that answer now: the champion's and a canary's")
    platform: str = "ultra-hstu"
    inputs: list[TensorMetadata] = Field(description="columns of /v1/rank and /v1/rank/arrow")
    outputs: list[TensorMetadata] = Field(description="a score of each candidate by task")


@router.get("/v2", name="server_metadata", responses=PROTECTED)
async def get_server() -> ServerMetadata:
    """What this server is."""
    return ServerMetadata(version=package_version())


@open_router.head("/v2/health/live", include_in_schema=False)
@open_router.get("/v2/health/live", name="server_live")
async def get_live() -> ServerLive:
    """This process lives."""
    return ServerLive()


@open_router.head("/v2/health/ready", include_in_schema=False)
@open_router.get("/v2/health/ready", name="server_ready", responses=NO_MODEL)
async def get_ready(replica: RunningReplica) -> ServerReady:
    """A model is loaded and answers."""
    await ask_in_time(replica)
    return ServerReady()


@router.get("/v2/models/{name}", name="model_metadata", responses=PROTECTED | NO_SUCH)
async def get_model_metadata(name: str, replica: RunningReplica) -> ModelMetadata:
    """What a model takes and gives."""
    return describe_model(await _find_model(name, replica))


@router.head("/v2/models/{name}/ready", include_in_schema=False)
@router.get("/v2/models/{name}/ready", name="model_ready", responses=PROTECTED | NO_SUCH)
async def get_model_ready(name: str, replica: RunningReplica) -> ModelReady:
    """The model is loaded and answers."""
    info = await _find_model(name, replica)
    return ModelReady(name=info.model_name)


async def _find_model(name: str, replica: RunningReplica) -> ModelInfo:
    info = await ask_in_time(replica)
    if info.model_name != name:
        raise HTTPException(404, f"the model that answers is {info.model_name}")
    return info


def describe_model(info: ModelInfo) -> ModelMetadata:
    """The protocol's words for what answers."""
    inputs = [_id_tensor("user_id", [1], info), _id_tensor("item_id", [-1], info)]
    for name in info.request_features:
        inputs.append(TensorMetadata(name=name, datatype="INT32", shape=[-1]))

    outputs = []
    for task in info.tasks:
        outputs.append(TensorMetadata(name=task, datatype="FP32", shape=[-1]))

    versions = [info.model_version]
    if info.canary_version is not None:
        versions.append(info.canary_version)
    return ModelMetadata(
        name=info.model_name, versions=list(map(str, versions)), inputs=inputs, outputs=outputs
    )


def _id_tensor(name: str, shape: list[int], info: ModelInfo) -> TensorMetadata:
    datatype = "BYTES" if name in info.text_ids else "INT64"
    return TensorMetadata(name=name, datatype=datatype, shape=shape)
