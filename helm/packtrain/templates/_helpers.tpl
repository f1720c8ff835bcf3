{{/* Names, labels, environment, volumes. */}}

{{- define "packtrain.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end -}}

{{/* Never cut to a length, which would give two releases one name: "packtrain.validate.names" refuses what is too long. */}}
{{- define "packtrain.fullname" -}}
{{- $name := include "packtrain.name" . -}}
{{- .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- end -}}

{{- define "packtrain.selectorLabels" -}}
app.kubernetes.io/name: {{ include "packtrain.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "packtrain.labels" -}}
{{- include "packtrain.labelsWith" (list . dict) -}}
{{- end -}}

{{/* A resource's labels with some of its own, each key once: (list root own). */}}
{{- define "packtrain.labelsWith" -}}
{{- $root := index . 0 -}}
{{- $chart := printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" -}}
{{- $release := dict "app.kubernetes.io/version" $root.Chart.AppVersion "app.kubernetes.io/managed-by" $root.Release.Service "helm.sh/chart" $chart -}}
{{- merge (include "packtrain.selectorLabels" $root | fromYaml) $release (deepCopy (index . 1 | default dict)) (deepCopy ($root.Values.common.labels | default dict)) | toYaml -}}
{{- end -}}

{{/* What NetworkPolicies select all Ray pods by: (list root component own). */}}
{{- define "packtrain.podLabels" -}}
{{- $component := dict "app.kubernetes.io/component" (index . 1) -}}
{{- include "packtrain.labelsWith" (list (index . 0) (merge $component (deepCopy (index . 2 | default dict)))) -}}
{{- end -}}

{{/* Annotations of a pod, each key once: (list root section). */}}
{{- define "packtrain.podAnnotations" -}}
{{- merge (dict) ((index . 1).annotations | default dict) ((index . 0).Values.common.podAnnotations | default dict) | toYaml -}}
{{- end -}}

{{- define "packtrain.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "packtrain.headService" -}}
{{ include "packtrain.fullname" . }}-head-svc.{{ .Release.Namespace }}.svc
{{- end -}}

{{- define "packtrain.gcsPort" -}}
{{ index (.Values.head.rayStartParams | default dict) "port" | default "6379" }}
{{- end -}}

{{- define "packtrain.tlsSecret" -}}
{{- if .Values.tls.existingSecret -}}
{{ .Values.tls.existingSecret }}
{{- else if .Values.tls.certManager.enabled -}}
{{ include "packtrain.fullname" . }}-tls
{{- end -}}
{{- end -}}

{{- define "packtrain.authSecret" -}}
{{ .Values.ray.auth.existingSecret | default (include "packtrain.fullname" .) }}
{{- end -}}

{{/* Port of an address or URL, else what is usual: (list address usual). */}}
{{- define "packtrain.urlPort" -}}
{{- $authority := index . 0 | regexFind "^([A-Za-z0-9+.-]+://)?[^/?#]*" -}}
{{- regexFind ":[0-9]+$" $authority | trimPrefix ":" | default (index . 1) -}}
{{- end -}}

{{/* PostgreSQL's ports, a text with spaces between them: of `database.egress.port`, else of the URL's address and parameters. libpq takes
several hosts and ports there. */}}
{{- define "packtrain.databasePorts" -}}
{{- if .Values.database.egress.port -}}
{{ .Values.database.egress.port | int64 }}
{{- else -}}
{{- $url := .Values.config.tenancy.database | replace "%3A" ":" | replace "%2C" "," -}}
{{- $ports := list -}}
{{- range regexFindAll "[?&]port=[0-9,]+" $url -1 -}}
{{- $ports = concat $ports (regexFindAll "[0-9]+" . -1) -}}
{{- end -}}
{{- range regexFindAll "[?&]host=[^&#]+" $url -1 -}}
{{- range regexFindAll ":[0-9]+(,|$)" . -1 -}}
{{- $ports = append $ports (regexFind "[0-9]+" .) -}}
{{- end -}}
{{- end -}}
{{- with include "packtrain.urlPort" (list $url "") -}}
{{- $ports = append $ports . -}}
{{- end -}}
{{- $ports | default (list "5432") | uniq | join " " -}}
{{- end -}}
{{- end -}}

{{/* "true", or "" where everybody is served without keys. `tenancy: null` says that, by which helm removes the key; a section without
keys of its own is tenancy as by default. */}}
{{- define "packtrain.tenancy" -}}
{{- if kindIs "map" .Values.config.tenancy -}}true{{- end -}}
{{- end -}}

{{/* "sqlite", "postgresql" or "" without tenancy. */}}
{{- define "packtrain.database" -}}
{{- if include "packtrain.tenancy" . -}}
{{- $url := .Values.config.tenancy.database -}}
{{- if or (not $url) (hasPrefix "sqlite" $url) -}}sqlite{{- else -}}postgresql{{- end -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.weightsClaim" -}}
{{ .Values.weights.pvc.existingClaim | default (printf "%s-weights" (include "packtrain.fullname" .)) }}
{{- end -}}

{{/* The file that says that everything of this source has been copied. */}}
{{- define "packtrain.weightsMarker" -}}
.packtrain-complete-{{ printf "%s %s" .Values.weights.s3.uri .Values.weights.s3.endpoint | sha256sum | trunc 8 }}
{{- end -}}

{{/* Groups of worker nodes as JSON, each whole: what one leaves out is as in `worker`, what it gives replaces that. */}}
{{- define "packtrain.workerGroups" -}}
{{- $groups := list .Values.worker -}}
{{- range $name, $own := .Values.additionalWorkerGroups -}}
{{- $group := deepCopy $.Values.worker -}}
{{- $_ := set $group "groupName" $name -}}
{{- range $key, $value := $own -}}
{{- if eq $key "podDisruptionBudget" -}}
{{- range $inner, $given := $value -}}
{{- $_ := set $group.podDisruptionBudget $inner $given -}}
{{- end -}}
{{- else -}}
{{- $_ := set $group $key $value -}}
{{- end -}}
{{- end -}}
{{- $groups = append $groups $group -}}
{{- end -}}
{{- $groups | toJson -}}
{{- end -}}

{{/* The largest of all drains is what every Ray pod waits for. */}}
{{- define "packtrain.drainSeconds" -}}
{{ dig "gateway" "drain_timeout_s" 30 .Values.config }}
{{- end -}}

{{/* The configuration that `packtrain serve` reads: the user's, and what the chart decides. */}}
{{- define "packtrain.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $gateway := dict "insecure" .Values.insecure -}}
{{- if include "packtrain.tlsSecret" . -}}
{{- $tls := dict "certificate" "/etc/packtrain/tls/tls.crt" "private_key" "/etc/packtrain/tls/tls.key" -}}
{{- if .Values.tls.requireClientCertificate -}}
{{- $_ := set $tls "client_ca" "/etc/packtrain/tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $gateway "tls" $tls -}}
{{- end -}}
{{- $host := dict "host" "0.0.0.0" -}}
{{- $_ := set $config "gateway" (merge $gateway (default dict $config.gateway) $host) -}}
{{- $_ := set $config "admin" (merge dict (default dict $config.admin) $host) -}}
{{- /* A port that is off: helm's null would bring its default back. */}}
{{- range list (list $config.gateway "http_port") (list $config.admin "port") (list $config.admin "metrics_port") -}}
{{- if and (hasKey (index . 0) (index . 1)) (not (get (index . 0) (index . 1))) -}}
{{- $_ := set (index . 0) (index . 1) nil -}}
{{- end -}}
{{- end -}}
{{- $tenancy := include "packtrain.tenancy" . -}}
{{- if $tenancy -}}
{{- if not $config.tenancy.database -}}
{{- $_ := set $config.tenancy "database" "sqlite:////var/lib/packtrain/tenants.db" -}}
{{- end -}}
{{- else -}}
{{- $_ := unset $config "tenancy" -}}
{{- end -}}
{{- $address := printf "%s:%s" (include "packtrain.headService" .) (include "packtrain.gcsPort" .) -}}
{{- $_ := set $config "ray" (dict "address" $address "detached" true "num_gateways" .Values.gateway.replicas "wait_for_nodes_s" .Values.driver.waitForNodesSeconds) -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Environment of a container that runs Ray or the driver, each name once, later lists over earlier ones: (list root more…). */}}
{{- define "packtrain.environment" -}}
{{- $root := first . -}}
{{- $byName := dict -}}
{{- $names := list -}}
{{- range prepend (prepend (rest .) $root.Values.common.containerEnv) (include "packtrain.ownEnvironment" $root | fromYamlArray) -}}
{{- range . -}}
{{- $_ := set $byName .name . -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- $variables := list -}}
{{- range $names | uniq -}}
{{- $variables = append $variables (get $byName .) -}}
{{- end -}}
{{- $variables | toYaml -}}
{{- end -}}

{{/* What values may not set: what Ray's token, its state, keys and draining depend on. */}}
{{- define "packtrain.reservedVariables" -}}
^(RAY_SERVE_.*|RAY_AUTH_.*|RAY_gcs_.*|RAY_ADDRESS|RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S|RAY_enable_metrics_collection|RAY_task_events_report_interval_ms|RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO|PGPASSWORD)$
{{- end -}}

{{/* The settings are those of a private cluster (serving/driver), and the driver refuses a cluster whose nodes lack one. */}}
{{- define "packtrain.ownEnvironment" -}}
- {name: HOME, value: /home/packtrain}
- {name: PACKTRAIN_LOG_LEVEL, value: {{ .Values.common.logLevel | quote }}}
- {name: PACKTRAIN_LOG_FORMAT, value: {{ .Values.common.logFormat | quote }}}
{{- with .Values.common.otlpEndpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
- {name: RAY_SERVE_USE_GRPC_BY_DEFAULT, value: "1"}
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
- {name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP, value: "0"}
- {name: RAY_SERVE_FREEZE_GC_ON_STARTUP, value: "1"}
- {name: RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE, value: "1000"}
- {name: RAY_SERVE_CONTROL_LOOP_INTERVAL_S, value: "0.5"}
- {name: RAY_SERVE_LOG_TO_STDERR, value: "0"}
- {name: RAY_task_events_report_interval_ms, value: "0"}
- {name: RAY_enable_metrics_collection, value: "0"}
- {name: MALLOC_ARENA_MAX, value: "4"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
# A pod's preStop has drained its node already. Ray would do it once more at SIGTERM, and the head, with Serve's controller, and the
# driver's node, with the quota authority, would wait for the whole of these seconds: nothing takes those two away from them.
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "0"}
- {name: RAY_ROTATION_MAX_BYTES, value: "67108864"}
- {name: RAY_ROTATION_BACKUP_COUNT, value: "3"}
{{- if .Values.gcsFaultTolerance.enabled }}
# A volume that moves with the head takes longer than the minute after which a node gives up.
- {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "600"}
{{- end }}
{{- if eq (include "packtrain.database" .) "postgresql" }}
{{- with .Values.database.passwordSecret.name }}
# Every node may come to run the quota authority. A Ray cluster is one domain of trust in any case.
- name: PGPASSWORD
  valueFrom:
    secretKeyRef: {name: {{ . | quote }}, key: {{ $.Values.database.passwordSecret.key | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* For pods that KubeRay does not make, which sets these itself in its own. */}}
{{- define "packtrain.authEnvironment" -}}
{{- if .Values.ray.auth.enabled -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "packtrain.authSecret" . | quote }}, key: auth_token}
{{- end }}
{{- end -}}

{{- define "packtrain.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "packtrain.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What every pod can write to: (list root shmSize). */}}
{{- define "packtrain.volumes" -}}
{{- $root := index . 0 -}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ index . 1 | quote }}}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
- name: ray-logs
  emptyDir: {sizeLimit: 10Gi}
- name: home
  emptyDir: {sizeLimit: 1Gi}
{{- if include "packtrain.tlsSecret" $root }}
- name: tls
  secret: {secretName: {{ include "packtrain.tlsSecret" $root | quote }}, defaultMode: 0440}
{{- end }}
{{- if has $root.Values.weights.source (list "pvc" "s3") }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "packtrain.weightsClaim" $root | quote }}, readOnly: true}
{{- else if eq $root.Values.weights.source "init" }}
- name: models
  emptyDir: {sizeLimit: {{ $root.Values.weights.init.sizeLimit | quote }}}
{{- end }}
{{- end -}}

{{- define "packtrain.volumeMounts" -}}
- {name: shared-mem, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: home, mountPath: /home/packtrain}
{{- if include "packtrain.tlsSecret" . }}
- {name: tls, mountPath: /etc/packtrain/tls, readOnly: true}
{{- end }}
{{- if ne .Values.weights.source "none" }}
- name: models
  mountPath: /models
  readOnly: true
  {{- with .Values.weights.pvc.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Containers that run before Ray: weights must be there. */}}
{{- define "packtrain.initContainers" -}}
{{- if eq .Values.weights.source "s3" }}
- name: wait-for-weights
  image: {{ include "packtrain.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  # Tells every ten seconds how many bytes have come.
  command: [packtrain, k8s, wait-for-weights, /models, {{ include "packtrain.weightsMarker" . }}]
  securityContext: {{- include "packtrain.securityContext" . | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {cpu: 500m, memory: 256Mi}
  volumeMounts:
    - name: models
      mountPath: /models
      readOnly: true
      {{- with .Values.weights.pvc.subPath }}
      subPath: {{ . | quote }}
      {{- end }}
    - {name: home, mountPath: /home/packtrain}
{{- end }}
{{- with .Values.weights.initContainers }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Before SIGTERM: Ray and its controller are told that the node goes, its gateway and groups end when their requests have. */}}
{{- define "packtrain.lifecycle" -}}
preStop:
  exec:
    command: [packtrain, k8s, drain, --timeout-s, {{ add (include "packtrain.drainSeconds" . | float64 | ceil | int) 30 | quote }}]
{{- end -}}
