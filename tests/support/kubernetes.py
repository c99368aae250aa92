"""Schemas of what our files under deploy/ use of Kubernetes, written down field by field.

Anything else in a file is refused, so a slip of the pen is found without an API server.
"""

STRING, BOOL = {"type": "string"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}  # int32
LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}
STRINGS = {"type": "object", "additionalProperties": STRING}


def fields(required: str = "", **known: dict) -> dict:
    """An object of these fields alone."""
    return {
        "type": "object",
        "properties": known,
        "required": required.split(),
        "additionalProperties": False,
    }


def each(of: dict) -> dict:
    return {"type": "array", "items": of, "minItems": 1}


def one_of(*values: str) -> dict:
    return {"enum": list(values)}


QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
SECRET_KEY = fields("secretKeyRef", secretKeyRef=fields("name key", name=STRING, key=STRING))
ONE_SOURCE = {"minProperties": 2, "maxProperties": 2}  # a name and one source

# pods of Deployments and StatefulSets
KEY = fields("name key", name=STRING, key=STRING)
PROBE = fields(
    "periodSeconds",
    exec=fields("command", command=each(STRING)),
    httpGet=fields("path port", path={"type": "string", "pattern": "^/"}, port=LABEL),
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
LOCKED = fields(
    "allowPrivilegeEscalation readOnlyRootFilesystem capabilities",
    allowPrivilegeEscalation={"const": False},
    readOnlyRootFilesystem={"const": True},
    capabilities={"const": {"drop": ["ALL"]}},
)
MOUNT = fields(
    "name mountPath",
    name=LABEL,
    mountPath={"type": "string", "pattern": "^/[^:]*$"},
    readOnly=BOOL,
)
CONTAINER = fields(
    "name image ports resources securityContext startupProbe readinessProbe livenessProbe",
    name=LABEL,
    image={"type": "string", "pattern": ":[^:]*[0-9]"},  # a version, not whatever is newest
    command=each(STRING),
    env=each(
        fields("name", name=STRING, value=STRING, valueFrom=SECRET_KEY) | {"maxProperties": 2}
    ),
    envFrom=each(
        fields(
            configMapRef=fields("name", name=LABEL),
            secretRef=fields("name", name=LABEL, optional=BOOL),
        )
    ),
    ports=each(fields("containerPort name", containerPort=PORT, name=LABEL)),
    securityContext=LOCKED,
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=fields("limits requests", limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=each(MOUNT),
)
VOLUME = (
    fields(
        "name",
        name=LABEL,
        emptyDir=fields("sizeLimit", medium={"const": "Memory"}, sizeLimit=QUANTITY),
        secret=fields("secretName", secretName=STRING),
        configMap=fields("name", name=STRING),
    )
    | ONE_SOURCE
)
SELECTOR = fields("matchLabels", matchLabels=STRINGS)
POD_IDENTITY = fields(
    "runAsNonRoot runAsUser runAsGroup seccompProfile",
    runAsNonRoot={"const": True},
    runAsUser=COUNT,
    runAsGroup=COUNT,
    fsGroup=COUNT,
    fsGroupChangePolicy=one_of("OnRootMismatch", "Always"),
    seccompProfile={"const": {"type": "RuntimeDefault"}},
)
POD = fields(
    "metadata spec",
    metadata=fields("labels", labels=STRINGS),
    spec=fields(
        "containers securityContext automountServiceAccountToken",
        containers=each(CONTAINER),
        volumes=each(VOLUME),
        serviceAccountName=LABEL,
        automountServiceAccountToken={"const": False},
        terminationGracePeriodSeconds=COUNT,
        securityContext=POD_IDENTITY,
        topologySpreadConstraints=each(
            fields(
                "maxSkew topologyKey whenUnsatisfiable labelSelector",
                maxSkew=COUNT,
                topologyKey=STRING,
                whenUnsatisfiable=one_of("DoNotSchedule", "ScheduleAnyway"),
                labelSelector=SELECTOR,
            )
        ),
    ),
)

# what stands beside them
CLAIM = fields(
    "accessModes resources",
    accessModes=each(one_of("ReadWriteOnce", "ReadWriteMany")),
    storageClassName=STRING,
    resources=fields("requests", requests=QUANTITIES),
)
PEER = fields(podSelector=SELECTOR, namespaceSelector=fields(matchLabels=STRINGS))
RULE = fields(
    "from",
    ports=each(
        fields(
            "protocol port",
            protocol=one_of("TCP", "UDP"),
            port={"anyOf": [PORT, LABEL]},
        )
    ),
    **{"from": each(PEER)},
)
SPECS = {
    ("apps/v1", "Deployment"): fields(
        "replicas selector template",
        replicas=COUNT,
        selector=SELECTOR,
        strategy=fields(rollingUpdate=fields(maxSurge=COUNT, maxUnavailable=COUNT)),
        template=POD,
    ),
    ("apps/v1", "StatefulSet"): fields(
        "serviceName replicas selector template",
        serviceName=LABEL,
        replicas=COUNT,
        selector=SELECTOR,
        template=POD,
        volumeClaimTemplates=each(
            fields("metadata spec", metadata=fields("name", name=LABEL), spec=CLAIM)
        ),
    ),
    ("v1", "Service"): fields(
        "selector ports",
        clusterIP={"const": "None"},
        selector=STRINGS,
        ports=each(fields("name port targetPort", name=LABEL, port=PORT, targetPort=LABEL)),
    ),
    ("policy/v1", "PodDisruptionBudget"): fields(
        "selector", selector=SELECTOR, minAvailable=COUNT, maxUnavailable=COUNT
    )
    | ONE_SOURCE,  # a selector and one bound
    ("networking.k8s.io/v1", "NetworkPolicy"): fields(
        "podSelector policyTypes",
        podSelector=SELECTOR,
        policyTypes=each(one_of("Ingress", "Egress")),
        ingress=each(RULE),
        egress={"const": []},
    ),
}
METADATA = fields("name", name=LABEL, labels=STRINGS, annotations=STRINGS)


def schema_of(document: dict) -> dict:
    """The schema for a document of its apiVersion and kind.

    Raises:
        KeyError: our files use no such kind.
    """
    kind = document["apiVersion"], document["kind"]
    head = {"apiVersion": STRING, "kind": STRING, "metadata": METADATA}
    if kind == ("v1", "ConfigMap"):
        return fields("metadata data", data=STRINGS, **head)
    if kind == ("v1", "ServiceAccount"):
        return fields("metadata", **head)
    return fields("metadata spec", spec=SPECS[kind], **head)
