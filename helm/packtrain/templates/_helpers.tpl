{{/* Names and labels. */}}

{{- define "packtrain.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end -}}

{{/* Never cut to a length, which would give two releases one name: "packtrain.validate.names" refuses what is too long. */}}
{{- define "packtrain.fullname" -}}
{{- $name := include "packtrain.name" . -}}
{{- .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- end -}}

{{- define "packtrain.selectorLabels" -}}
app.kubernetes.io/name: {{ include "packtrain.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "packtrain.labels" -}}
{{ include "packtrain.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.common.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What NetworkPolicies select all Ray pods by: (list root component). */}}
{{- define "packtrain.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "packtrain.labels" $root }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "packtrain.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "packtrain.headService" -}}
{{ include "packtrain.fullname" . }}-head-svc.{{ .Release.Namespace }}.svc.cluster.local
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

{{- define "packtrain.databasePort" -}}
{{- $url := dig "database" "" (.Values.config.tenancy | default dict) -}}
{{- $parameter := regexFind "[?&]port=[0-9]+" $url | regexFind "[0-9]+$" -}}
{{- .Values.database.egress.port | default (include "packtrain.urlPort" (list $url ($parameter | default "5432"))) -}}
{{- end -}}

{{/* "sqlite", "postgresql" or "" without tenancy. */}}
{{- define "packtrain.database" -}}
{{- with .Values.config.tenancy -}}
{{- if or (not .database) (hasPrefix "sqlite" .database) -}}sqlite{{- else -}}postgresql{{- end -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.weightsClaim" -}}
{{ .Values.weights.pvc.existingClaim | default (printf "%s-weights" (include "packtrain.fullname" .)) }}
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
{{- $gateway := dict "host" "0.0.0.0" "insecure" .Values.insecure -}}
{{- if include "packtrain.tlsSecret" . -}}
{{- $tls := dict "certificate" "/etc/packtrain/tls/tls.crt" "private_key" "/etc/packtrain/tls/tls.key" -}}
{{- if .Values.tls.requireClientCertificate -}}
{{- $_ := set $tls "client_ca" "/etc/packtrain/tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $gateway "tls" $tls -}}
{{- end -}}
{{- $_ := set $config "gateway" (merge $gateway (default dict $config.gateway)) -}}
{{- $_ := set $config "admin" (merge (dict "host" "0.0.0.0") (default dict $config.admin)) -}}
{{- $tenancy := $config.tenancy -}}
{{- if $tenancy -}}
{{- if not $tenancy.database -}}
{{- $_ := set $tenancy "database" "sqlite:////var/lib/packtrain/tenants.db" -}}
{{- end -}}
{{- else -}}
{{- $_ := unset $config "tenancy" -}}
{{- end -}}
{{- $address := printf "%s:%s" (include "packtrain.headService" .) (include "packtrain.gcsPort" .) -}}
{{- $_ := set $config "ray" (dict "address" $address "detached" true "num_gateways" .Values.gateway.replicas "wait_for_nodes_s" .Values.driver.waitForNodesSeconds) -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Environment of every container that runs Ray or the driver. The settings are those of a private cluster (serving/driver), and the
driver refuses a cluster whose nodes lack one. */}}
{{- define "packtrain.environment" -}}
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
    secretKeyRef: {name: {{ . }}, key: {{ $.Values.database.passwordSecret.key }}}
{{- end }}
{{- end }}
{{- with .Values.common.containerEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* For pods that KubeRay does not make, which sets these itself in its own. */}}
{{- define "packtrain.authEnvironment" -}}
{{- if .Values.ray.auth.enabled }}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "packtrain.authSecret" . }}, key: auth_token}
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
  emptyDir: {medium: Memory, sizeLimit: {{ index . 1 }}}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
- name: ray-logs
  emptyDir: {sizeLimit: 10Gi}
- name: home
  emptyDir: {sizeLimit: 1Gi}
{{- if include "packtrain.tlsSecret" $root }}
- name: tls
  secret: {secretName: {{ include "packtrain.tlsSecret" $root }}, defaultMode: 0440}
{{- end }}
{{- if has $root.Values.weights.source (list "pvc" "s3") }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "packtrain.weightsClaim" $root }}, readOnly: true}
{{- else if eq $root.Values.weights.source "init" }}
- name: models
  emptyDir: {sizeLimit: {{ $root.Values.weights.init.sizeLimit }}}
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
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Containers that run before Ray: weights must be there. */}}
{{- define "packtrain.initContainers" -}}
{{- if eq .Values.weights.source "s3" }}
- name: wait-for-weights
  image: {{ include "packtrain.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  # Tells every ten seconds how many bytes have come.
  command: [packtrain, k8s, wait-for-weights, /models]
  securityContext: {{- include "packtrain.securityContext" . | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {cpu: 500m, memory: 256Mi}
  volumeMounts:
    - name: models
      mountPath: /models
      readOnly: true
      {{- with .Values.weights.pvc.subPath }}
      subPath: {{ . }}
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
