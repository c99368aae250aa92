# MLflow's server at the version that the jobs were tested with, with drivers for Postgres and S3.
#   docker build -f deploy/stores/mlflow.Dockerfile -t registry.example.com/ultra-hstu-mlflow:0.2.0 .
# Not built by the tests.
FROM python:3.11-slim

COPY constraints.txt /tmp/constraints.txt
RUN python -m pip install --no-cache-dir -c /tmp/constraints.txt mlflow 'psycopg[binary]' boto3
USER 10001:10001
