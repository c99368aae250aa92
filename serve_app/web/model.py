"""`/v1/model`: the version that answers, and what it understands."""

from fastapi import APIRouter

from serve_app.schemas import ModelInfo
from serve_app.web.replica import RunningReplica
from serve_app.web.responses import PROTECTED

router = APIRouter(tags=["model"])


@router.get("/v1/model", name="model", responses=PROTECTED)
async def get_model(replica: RunningReplica) -> ModelInfo:
    """Which version answers."""
    return await replica.model_info()
