"""Move the alias champion back to the version that it stood on before; jobs.deploy then serves it."""

from jobs import cli
from pipeline.tracking import registry
from pipeline.tracking.server import mlflow_server, plan_server


def main(job: cli.Job) -> None:
    with mlflow_server(job.cfg):
        version = registry.rollback(job.cfg)
    print(f"champion={version}")


if __name__ == "__main__":
    cli.run(__doc__ or "", main, plan=plan_server)
