{{/* A port of the configuration: (list root section key default). Empty when it is turned off (false). */}}
{{- define "packtrain.port" -}}
{{- $root := index . 0 -}}
{{- $section := index $root.Values.config (index . 1) | default dict -}}
{{- $key := index . 2 -}}
{{- if hasKey $section $key -}}
{{- with index $section $key -}}{{ . | int64 }}{{- end -}}
{{- else -}}
{{ index . 3 }}
{{- end -}}
{{- end -}}

{{/* How many of a RayCluster's pods must stay: (list pods maxUnavailable). A whole number always: a RayCluster has no scale
subresource, and without it Kubernetes counts nothing of `maxUnavailable` or of shares, and lets no pod go at all. */}}
{{- define "packtrain.minAvailable" -}}
{{- $pods := index . 0 | int64 -}}
{{- $most := index . 1 -}}
{{- if kindIs "string" $most -}}
{{- /* Rounded up, as Kubernetes rounds shares of a Deployment. */}}
{{- $most = div (add (mul $pods (trimSuffix "%" $most | int64)) 99) 100 -}}
{{- end -}}
{{ max 0 (sub $pods ($most | int64)) }}
{{- end -}}

{{/* (list root section component): where a pod may lie. */}}
{{- define "packtrain.scheduling" -}}
{{- $root := index . 0 -}}
{{- $section := index . 1 -}}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with $section.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $section.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml $section.topologySpreadConstraints | nindent 2 }}
{{- else if eq (index . 2) "gateway" }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "packtrain.selectorLabels" $root | nindent 8 }}
        app.kubernetes.io/component: gateway
{{- end }}
{{- with $section.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "packtrain.agentPort" -}}
{{ index (. | default dict) "dashboard-agent-listen-port" | default "52365" }}
{{- end -}}

{{/* Of a pod without a gateway: its Ray node is alive. (list root rayStartParams) */}}
{{- define "packtrain.rayProbes" -}}
{{- $port := include "packtrain.agentPort" (index . 1) -}}
startupProbe:
  httpGet: {path: /api/healthz, port: {{ $port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/healthz, port: {{ $port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  # A head that moves with its volume is away for minutes. The node waits for it.
  failureThreshold: 30
readinessProbe:
  httpGet: {path: /api/healthz, port: {{ $port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}

{{/* Alive is the Ray node: Serve replaces a gateway process within seconds, and before the driver has deployed there is none. Ready is
the gateway with a group behind it. kubelet's gRPC probe speaks no TLS; /readyz on the operators' port says the same in the clear. */}}
{{- define "packtrain.gatewayProbes" -}}
{{- $port := include "packtrain.agentPort" .Values.gateway.rayStartParams -}}
startupProbe:
  httpGet: {path: /api/healthz, port: {{ $port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/healthz, port: {{ $port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 30
readinessProbe:
  {{- if include "packtrain.tlsSecret" . }}
  httpGet: {path: /readyz, port: {{ include "packtrain.port" (list . "admin" "metrics_port" 9464) }}}
  {{- else }}
  grpc: {port: {{ include "packtrain.port" (list . "gateway" "port" 50051) }}}
  {{- end }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}

{{/* Of every Ray node, where the values do not say otherwise. Packtrain sends everything by value, so that the object store stays all
but empty; by default Ray would take a third of the memory for it, and a disk where /dev/shm is smaller than that. */}}
{{- define "packtrain.startParameters" -}}
object-store-memory: "100000000"
{{- end -}}
