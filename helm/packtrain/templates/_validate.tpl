{{/* What cannot work or would be insecure is refused here, with the value's name and what to do. Schemas refuse wrong types and names. */}}

{{/* GPUs that Ray counts on a node: `num-gpus`, else the limit. */}}
{{- define "packtrain.gpus" -}}
{{- $params := .rayStartParams | default dict -}}
{{- if hasKey $params "num-gpus" -}}
{{ index $params "num-gpus" }}
{{- else -}}
{{ include "packtrain.quantity" (dig "resources" "limits" "nvidia.com/gpu" 0 . | default 0) | float64 | int64 }}
{{- end -}}
{{- end -}}

{{/* A quantity of Kubernetes as a number. */}}
{{- define "packtrain.quantity" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- $units := dict "" 1.0 "n" 1e-9 "u" 1e-6 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 -}}
{{- $units = merge $units (dict "Ki" 0x1p10 "Mi" 0x1p20 "Gi" 0x1p30 "Ti" 0x1p40 "Pi" 0x1p50 "Ei" 0x1p60) -}}
{{ mulf (trimSuffix $unit $text | float64) (index $units $unit) }}
{{- end -}}

{{/* CPUs that Ray counts on a node: `num-cpus`, else the limit, else the request, rounded up as KubeRay does. */}}
{{- define "packtrain.cpus" -}}
{{- $params := .rayStartParams | default dict -}}
{{- if hasKey $params "num-cpus" -}}
{{ index $params "num-cpus" }}
{{- else -}}
{{ include "packtrain.quantity" (dig "resources" "limits" "cpu" "" . | default (dig "resources" "requests" "cpu" "0" .)) | float64 | ceil }}
{{- end -}}
{{- end -}}

{{/* Ranks of a model that one machine of a group holds: (list group onGpu cpusPerRank). */}}
{{- define "packtrain.ranks" -}}
{{- $group := index . 0 -}}
{{- $onGpu := index . 1 -}}
{{- $cpusPerRank := index . 2 -}}
{{- $gpus := include "packtrain.gpus" $group | int -}}
{{- if eq $cpusPerRank 0.0 -}}
{{ ternary $gpus 0 $onGpu }}
{{- else -}}
{{- $byCpus := addf (divf (include "packtrain.cpus" $group | float64) $cpusPerRank) 1e-9 | floor | int -}}
{{ ternary (min $gpus $byCpus) $byCpus $onGpu }}
{{- end -}}
{{- end -}}

{{- define "packtrain.validate" -}}
{{- include "packtrain.validate.security" . -}}
{{- include "packtrain.validate.names" . -}}
{{- include "packtrain.validate.network" . -}}
{{- include "packtrain.validate.images" . -}}
{{- include "packtrain.validate.resources" . -}}
{{- include "packtrain.validate.models" . -}}
{{- include "packtrain.validate.operation" . -}}
{{- end -}}

{{- define "packtrain.validate.security" -}}
{{- $v := .Values -}}
{{- if not $v.insecure -}}
{{- if not (include "packtrain.tenancy" .) -}}
{{- fail "config.tenancy is null: everybody who reaches the Service could use it without a key. Configure tenancy, or say `insecure: true`" -}}
{{- end -}}
{{- if not $v.ray.auth.enabled -}}
{{- fail "ray.auth.enabled is false: whoever reaches Ray's ports could run code. Leave it on, or say `insecure: true`" -}}
{{- end -}}
{{- if not $v.networkPolicy.enabled -}}
{{- fail "networkPolicy.enabled is false: Ray's ports would be open to the whole cluster. Leave it on, or say `insecure: true`" -}}
{{- end -}}
{{- if and (has $v.service.type (list "LoadBalancer" "NodePort")) (not (include "packtrain.tlsSecret" .)) -}}
{{- fail (printf "service.type is %s and there is no TLS: keys and prompts would travel in clear beyond the cluster. Set tls.existingSecret or tls.certManager, or say `insecure: true`" $v.service.type) -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.tls) -}}
{{- fail "ingress.enabled without ingress.tls: keys and prompts would travel in clear. Set ingress.tls, or say `insecure: true`" -}}
{{- end -}}
{{- range $v.gatewayApi.parentRefs -}}
{{- if and $v.gatewayApi.enabled (not .sectionName) -}}
{{- fail (printf "gatewayApi.parentRefs: %s has no sectionName: the routes would also attach to listeners without TLS. Name a listener with TLS, or say `insecure: true`" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $database := ($v.config.tenancy | default dict).database | default "" -}}
{{- if or (regexMatch "://[^:/]*:[^@]*@" $database) (regexMatch "[?&][a-z_]*(password|_key|secret)=" $database) -}}
{{- fail "config.tenancy.database has a password in it, which everybody who reads the ConfigMap would see: leave it out, and name its Secret in database.passwordSecret" -}}
{{- end -}}
{{- if regexMatch ":[^@]*@" ($v.gcsFaultTolerance.redis.address | default "") -}}
{{- fail "gcsFaultTolerance.redis.address has a password in it, which everybody who reads the RayCluster would see: leave it out, and name its Secret in gcsFaultTolerance.redis.passwordSecret" -}}
{{- end -}}
{{- $places := dict "common" $v.common "head" $v.head "gateway" $v.gateway "driver" $v.driver -}}
{{- range include "packtrain.workerGroups" . | fromJsonArray -}}
{{- $_ := set $places (printf "worker group %s" .groupName) . -}}
{{- end -}}
{{- range $place, $section := $places -}}
{{- range $section.containerEnv -}}
{{- if and (hasKey . "value") (regexMatch "(?i)(password|passwd|secret|token|credential|api_?key|access_?key)" .name) -}}
{{- fail (printf "%s.containerEnv: %s has its value in the values. Keep it in a Secret, and name that with valueFrom.secretKeyRef" $place .name) -}}
{{- end -}}
{{- if regexMatch (include "packtrain.reservedVariables" $) .name -}}
{{- fail (printf "%s.containerEnv: %s is the chart's own. Leave it out" $place .name) -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := $section.rayStartParams -}}
{{- if has $name (list "redis-password" "redis-username") -}}
{{- fail (printf "%s.rayStartParams.%s would stand in the process list. Use gcsFaultTolerance.redis.passwordSecret" $place $name) -}}
{{- end -}}
{{- if has $name (list "address" "block" "head") -}}
{{- fail (printf "%s.rayStartParams.%s is the chart's own: it decides which cluster a node joins, and that its container lives as long as Ray. Leave it out" $place $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.tls.requireClientCertificate (not (include "packtrain.tlsSecret" .)) -}}
{{- fail "tls.requireClientCertificate needs tls.existingSecret or tls.certManager" -}}
{{- end -}}
{{- if and $v.tls.certManager.enabled $v.tls.existingSecret -}}
{{- fail "tls.existingSecret and tls.certManager.enabled are both given: one of them makes the certificate. Leave the other out" -}}
{{- end -}}
{{- if and $v.tls.certManager.enabled (not $v.tls.certManager.issuerRef) -}}
{{- fail "tls.certManager.enabled needs tls.certManager.issuerRef" -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.validate.names" -}}
{{- $name := include "packtrain.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "the resources' name would be %q; Kubernetes and KubeRay take a letter first, then small letters, digits and hyphens, no hyphen last, and at most 40 characters in all. Set fullnameOverride" $name) -}}
{{- end -}}
{{- $names := list "head" "gateway" "gateways" -}}
{{- $labelled := dict "common" .Values.common "head" .Values.head "gateway" .Values.gateway "driver" .Values.driver -}}
{{- range include "packtrain.workerGroups" . | fromJsonArray -}}
{{- if not (regexMatch "^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$" .groupName) -}}
{{- fail (printf "additionalWorkerGroups: the name %q is no part of Kubernetes' names: small letters, digits and hyphens, no hyphen first or last, at most 40 characters" .groupName) -}}
{{- end -}}
{{- if has .groupName $names -}}
{{- fail (printf "worker groups: the name %q stands twice; head, gateway and gateways are the chart's own" .groupName) -}}
{{- end -}}
{{- $names = append $names .groupName -}}
{{- $_ := set $labelled (printf "worker group %s" .groupName) . -}}
{{- end -}}
{{- $volumes := list -}}
{{- $paths := list -}}
{{- range include "packtrain.volumes" (list $ "1Gi") | fromYamlArray -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- range include "packtrain.volumeMounts" . | fromYamlArray -}}
{{- $paths = append $paths .mountPath -}}
{{- end -}}
{{- range $group := include "packtrain.workerGroups" . | fromJsonArray -}}
{{- $seen := $volumes -}}
{{- range .volumes -}}
{{- if has .name $seen -}}
{{- fail (printf "worker group %s.volumes: the name %q stands twice; %s are the chart's own" $group.groupName .name (join ", " $volumes)) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- $seen = $paths -}}
{{- range .volumeMounts -}}
{{- if has .mountPath $seen -}}
{{- fail (printf "worker group %s.volumeMounts: %s is mounted twice; %s are the chart's own" $group.groupName .mountPath (join ", " $paths)) -}}
{{- end -}}
{{- $seen = append $seen .mountPath -}}
{{- end -}}
{{- end -}}
{{- /* The chart's containers, and those that KubeRay puts before Ray. */}}
{{- $seen := list "wait-gcs-ready" "ray-node" "wait-for-weights" "ray-head" "ray-worker" "autoscaler" "driver" -}}
{{- range .Values.weights.initContainers -}}
{{- if has (toString .name) $seen -}}
{{- fail (printf "weights.initContainers: the name %q stands twice, or is one of the pods' own containers; each needs its own" .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- $own := list "helm.sh/chart" "packtrain.io/worker-group" -}}
{{- range list "name" "instance" "component" "version" "managed-by" -}}
{{- $own = append $own (printf "app.kubernetes.io/%s" .) -}}
{{- end -}}
{{- range $name, $section := $.Values.monitoring -}}
{{- $_ := set $labelled (printf "monitoring.%s" $name) $section -}}
{{- end -}}
{{- range $place, $section := $labelled -}}
{{- range $label, $_ := $section.labels -}}
{{- if has $label $own -}}
{{- fail (printf "%s.labels: %s is the chart's own, by which Services, NetworkPolicies and budgets find their pods. Leave it out" $place $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.validate.network" -}}
{{- $v := .Values -}}
{{- $ports := dict -}}
{{- range list (list "gateway" "port" 50051) (list "gateway" "http_port" 8000) (list "admin" "port" 50052) (list "admin" "metrics_port" 9464) -}}
{{- $field := printf "config.%s.%s" (index . 0) (index . 1) -}}
{{- $port := include "packtrain.port" (prepend . $) -}}
{{- if and $port (hasKey $ports $port) -}}
{{- fail (printf "%s and %s are both %s; each needs a port of its own" (index $ports $port) $field $port) -}}
{{- end -}}
{{- $_ := set $ports $port $field -}}
{{- $place := ternary "driver" "gateway" (eq $field "config.admin.port") -}}
{{- $ofRay := merge (dict) ((index $v $place).rayStartParams | default dict) (dict "dashboard-agent-listen-port" "52365") -}}
{{- range $name, $taken := omit $ofRay "min-worker-port" "max-worker-port" -}}
{{- if and $port (hasSuffix "-port" $name) (eq $port (toString $taken)) -}}
{{- fail (printf "%s is %s, which Ray listens at in the same pods (%s.rayStartParams.%s); choose another" $field $port $place $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (include "packtrain.port" (list $ "gateway" "http_port" 8000)) -}}
{{- if or $v.ingress.enabled (and $v.gatewayApi.enabled $v.gatewayApi.http) -}}
{{- fail (printf "config.gateway.http_port is off, and %s needs it" (ternary "ingress.enabled" "gatewayApi.http" $v.ingress.enabled)) -}}
{{- end -}}
{{- end -}}
{{- if not (include "packtrain.port" (list $ "admin" "metrics_port" 9464)) -}}
{{- if or (include "packtrain.tlsSecret" .) $v.monitoring.podMonitor.enabled -}}
{{- fail (printf "config.admin.metrics_port is off, and %s needs it" (ternary "monitoring.podMonitor" "TLS, with which kubelet asks /readyz there," $v.monitoring.podMonitor.enabled)) -}}
{{- end -}}
{{- end -}}
{{- if and $v.service.loadBalancerSourceRanges (ne $v.service.type "LoadBalancer") -}}
{{- fail (printf "service.loadBalancerSourceRanges are given and service.type is %s: they would keep nobody out. networkPolicy.clients says who may come" $v.service.type) -}}
{{- end -}}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.clients) -}}
{{- $open := list -}}
{{- if has $v.service.type (list "LoadBalancer" "NodePort") -}}
{{- $open = append $open (printf "service.type is %s" $v.service.type) -}}
{{- end -}}
{{- range list "ingress" "gatewayApi" -}}
{{- if index $v . "enabled" -}}
{{- $open = append $open (printf "%s.enabled is true" .) -}}
{{- end -}}
{{- end -}}
{{- range $open -}}
{{- fail (printf "%s and networkPolicy.clients is empty: the NetworkPolicy lets in nobody from outside the release's namespace. List there who may come: an ingress controller's namespace, or an ipBlock" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A request above its limit, and another number of GPUs than the limit, are refused by Kubernetes only when pods are made. */}}
{{- define "packtrain.validate.resources" -}}
{{- $v := .Values -}}
{{- $places := dict "ray.autoscaling.resources" $v.ray.autoscaling.resources "head.resources" $v.head.resources "gateway.resources" $v.gateway.resources "driver.resources" $v.driver.resources "driver.rayResources" $v.driver.rayResources "worker.resources" $v.worker.resources -}}
{{- range $name, $group := $v.additionalWorkerGroups -}}
{{- $_ := set $places (printf "additionalWorkerGroups.%s.resources" $name) ($group.resources | default dict) -}}
{{- end -}}
{{- range $place, $resources := $places -}}
{{- $limits := $resources.limits | default dict -}}
{{- range $name, $request := $resources.requests -}}
{{- $isDevice := contains "/" $name -}}
{{- if or $isDevice (hasKey $limits $name) -}}
{{- $limit := index $limits $name | default 0 -}}
{{- $asked := include "packtrain.quantity" $request | float64 -}}
{{- $most := include "packtrain.quantity" $limit | float64 -}}
{{- if or (gt $asked $most) (and $isDevice (ne $asked $most)) -}}
{{- fail (printf "%s: requests.%s is %v and limits.%s is %v (the chart's, where you gave none); Kubernetes wants the limit %s" $place $name $request $name $limit (ternary "to be the same" "at least as high, or null for none" $isDevice)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.validate.images" -}}
{{- $images := dict "image" (include "packtrain.image" .) "weights.s3.image" .Values.weights.s3.image -}}
{{- range $index, $container := .Values.weights.initContainers -}}
{{- $_ := set $images (printf "weights.initContainers[%d].image" $index) (toString $container.image) -}}
{{- end -}}
{{- range $where, $image := $images -}}
{{- if not (contains "@sha256:" $image) -}}
{{- $tag := regexFind ":[^:/]+$" $image -}}
{{- if or (not $tag) (eq $tag ":latest") -}}
{{- fail (printf "%s is %q, which means another image tomorrow: name a version or a digest" $where $image) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.validate.models" -}}
{{- $groups := include "packtrain.workerGroups" . | fromJsonArray -}}
{{- $autoscaling := .Values.ray.autoscaling.enabled -}}
{{- $neededGpus := 0 -}}
{{- $neededCpus := 0.0 -}}
{{- /* What models that are scaled may take together is bounded by autoscaler.max_ranks. */}}
{{- $maxRanks := ($.Values.config.autoscaler | default dict).max_ranks -}}
{{- $scaledGpus := 0 -}}
{{- $scaledCpus := 0.0 -}}
{{- $scaledCpusPerRank := 0.0 -}}
{{- $names := list -}}
{{- $totalGpus := 0 -}}
{{- $totalCpus := 0.0 -}}
{{- range $groups -}}
{{- $count := mul (ternary .maxReplicas .replicas $autoscaling) .numOfHosts -}}
{{- $totalGpus = add $totalGpus (mul (include "packtrain.gpus" . | int) $count) -}}
{{- $totalCpus = addf $totalCpus (mulf (include "packtrain.cpus" . | float64) $count) -}}
{{- end -}}
{{- range .Values.config.models -}}
{{- $model := . -}}
{{- $own := list .name -}}
{{- range (.lora | default dict).adapters -}}
{{- $own = append $own .name -}}
{{- end -}}
{{- range $own -}}
{{- if has . $names -}}
{{- fail (printf "config.models: the name %q stands twice; each model and adapter needs its own" .) -}}
{{- end -}}
{{- $names = append $names . -}}
{{- end -}}
{{- if and (regexMatch "(?i)llama[-_ ]?2(\\.?[^0-9.]|\\.?$)" (printf "%s %s" .name .source)) (not $.Values.license.accept) -}}
{{- fail (printf "config.models: %s is Llama 2. Read the LLAMA 2 Community License and its Acceptable Use Policy (https://ai.meta.com/llama), and set license.accept: true" .name) -}}
{{- end -}}
{{- if eq $.Values.weights.source "none" -}}
{{- $sources := list (list "source" .source) (list "draft_model" (.draft_model | default "")) -}}
{{- range (.lora | default dict).adapters -}}
{{- $sources = append $sources (list (printf "adapter %s" .name) .source) -}}
{{- end -}}
{{- range $sources -}}
{{- if regexMatch "^/models(/|$)" (index . 1) -}}
{{- fail (printf "config.models: the %s of %s is %s, and weights.source is none: nothing is mounted at /models" (index . 0) $model.name (index . 1)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $tp := .tensor_parallel_size | default 1 | int -}}
{{- $numGroups := .num_groups | default 1 | int -}}
{{- $bound := "num_groups" -}}
{{- $isScaled := false -}}
{{- with .autoscaling -}}
{{- if has (ternary (toString .mode) "on" (hasKey . "mode")) (list "on" "true") -}}
{{- $isScaled = true -}}
{{- $bound = "autoscaling.max_groups" -}}
{{- $most := int .max_groups -}}
{{- if and $maxRanks (lt (div $maxRanks $tp | int) $most) -}}
{{- $most = div $maxRanks $tp | int -}}
{{- $bound = "autoscaling.max_groups, bounded by autoscaler.max_ranks," -}}
{{- end -}}
{{- $numGroups = max $numGroups $most | int -}}
{{- end -}}
{{- end -}}
{{- /* `auto` is a GPU where there are any. */}}
{{- $device := .device | default "auto" -}}
{{- $onGpu := or (eq $device "cuda") (and (eq $device "auto") (gt (int $totalGpus) 0)) -}}
{{- $cpusPerRank := ternary (toString .cpus_per_rank | float64) 1.0 (hasKey . "cpus_per_rank") -}}
{{- if and (eq $cpusPerRank 0.0) (not $onGpu) -}}
{{- fail (printf "config.models: %s has cpus_per_rank 0 and no GPUs; a rank must hold something to be placed by" $model.name) -}}
{{- end -}}
{{- $largest := 0 -}}
{{- $spanning := 0 -}}
{{- $packed := 0 -}}
{{- $spread := 0 -}}
{{- range $groups -}}
{{- $ranks := include "packtrain.ranks" (list . $onGpu $cpusPerRank) | int -}}
{{- $hosts := .numOfHosts | int -}}
{{- $replicas := ternary .maxReplicas .replicas $autoscaling | int -}}
{{- $largest = max $largest $ranks -}}
{{- $packed = add $packed (mul $replicas $hosts (div $ranks $tp)) -}}
{{- $spread = add $spread (mul $replicas (div (mul $ranks $hosts) $tp)) -}}
{{- if gt $hosts 1 -}}
{{- $spanning = max $spanning (mul $ranks $hosts) -}}
{{- end -}}
{{- end -}}
{{- $places := ternary $packed $spread (le $tp $largest) -}}
{{- $each := printf "%s%v CPU" (ternary "1 GPU and " "" $onGpu) $cpusPerRank -}}
{{- if gt $tp (max $largest $spanning) -}}
{{- fail (printf "config.models: %s has tensor_parallel_size %d, and no node has room for more than %d ranks of %s each%s. Lower it, or give the nodes more, or set numOfHosts so that a group may span machines" $model.name $tp $largest $each (ternary (printf " (%d over numOfHosts machines)" $spanning) "" (gt $spanning 0))) -}}
{{- end -}}
{{- if gt $numGroups $places -}}
{{- fail (printf "config.models: %s has %s %d of %d ranks of %s each, and there are nodes for %d. Raise replicas%s of a worker group" $model.name $bound $numGroups $tp $each $places (ternary " (maxReplicas)" "" $autoscaling)) -}}
{{- end -}}
{{- $gpus := ternary (mul $tp $numGroups) 0 $onGpu -}}
{{- $cpus := mulf $tp $numGroups $cpusPerRank -}}
{{- if $isScaled -}}
{{- $scaledGpus = add $scaledGpus $gpus -}}
{{- $scaledCpus = addf $scaledCpus $cpus -}}
{{- $scaledCpusPerRank = maxf $scaledCpusPerRank $cpusPerRank -}}
{{- else -}}
{{- $neededGpus = add $neededGpus $gpus -}}
{{- $neededCpus = addf $neededCpus $cpus -}}
{{- end -}}
{{- end -}}
{{- if $maxRanks -}}
{{- $scaledGpus = min $scaledGpus $maxRanks -}}
{{- $scaledCpus = minf $scaledCpus (mulf $maxRanks $scaledCpusPerRank) -}}
{{- end -}}
{{- $neededGpus = add $neededGpus $scaledGpus -}}
{{- $neededCpus = addf $neededCpus $scaledCpus -}}
{{- if gt $neededGpus $totalGpus -}}
{{- fail (printf "config.models: all groups together need %d GPUs, and the worker groups have %d" $neededGpus $totalGpus) -}}
{{- end -}}
{{- if gt $neededCpus (addf $totalCpus 1e-9) -}}
{{- fail (printf "config.models: all groups together need %v CPUs (cpus_per_rank of each rank), and the worker groups have %v" $neededCpus $totalCpus) -}}
{{- end -}}
{{- end -}}

{{- define "packtrain.validate.operation" -}}
{{- $v := .Values -}}
{{- $drain := include "packtrain.drainSeconds" . | float64 | ceil | int -}}
{{- if lt ($v.terminationGracePeriodSeconds | int) (add $drain 45 | int) -}}
{{- fail (printf "terminationGracePeriodSeconds is %d, and config.gateway.drain_timeout_s is %d: running requests would be cut off. At least %d are needed" ($v.terminationGracePeriodSeconds | int) $drain (add $drain 45 | int)) -}}
{{- end -}}
{{- if and (eq (include "packtrain.database" .) "sqlite") (gt ($v.gateway.replicas | int) 1) -}}
{{- fail (printf "gateway.replicas is %d and config.tenancy.database is SQLite, which only one machine can use: set config.tenancy.database to postgresql://USER@HOST/NAME" ($v.gateway.replicas | int)) -}}
{{- end -}}
{{- range $place := list "head" "gateway" "driver" -}}
{{- range $name := list "num-cpus" "num-gpus" -}}
{{- $given := dig "rayStartParams" $name "0" (index $v $place) -}}
{{- if ne $given "0" -}}
{{- fail (printf "%s.rayStartParams.%s is %q: replica groups would be placed there. It stays \"0\"" $place $name $given) -}}
{{- end -}}
{{- end -}}
{{- if and (ne $place "head") (hasKey ((index $v $place).rayStartParams | default dict) "resources") -}}
{{- fail (printf "%s.rayStartParams.resources is the chart's own, by which Ray finds these pods. Leave it out" $place) -}}
{{- end -}}
{{- end -}}
{{- if and $v.gcsFaultTolerance.enabled (eq $v.gcsFaultTolerance.backend "redis") (not $v.gcsFaultTolerance.redis.address) -}}
{{- fail "gcsFaultTolerance.backend is redis: gcsFaultTolerance.redis.address is missing" -}}
{{- end -}}
{{- range include "packtrain.workerGroups" . | fromJsonArray -}}
{{- if gt (.minReplicas | int) (.maxReplicas | int) -}}
{{- fail (printf "worker group %s: minReplicas %d is above maxReplicas %d" .groupName (.minReplicas | int) (.maxReplicas | int)) -}}
{{- end -}}
{{- if or (lt (.replicas | int) (.minReplicas | int)) (gt (.replicas | int) (.maxReplicas | int)) -}}
{{- fail (printf "worker group %s: replicas %d is not between minReplicas %d and maxReplicas %d" .groupName (.replicas | int) (.minReplicas | int) (.maxReplicas | int)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.weights.source "pvc") (not $v.weights.pvc.existingClaim) -}}
{{- fail "weights.source is pvc: weights.pvc.existingClaim is missing" -}}
{{- end -}}
{{- if and (eq $v.weights.source "s3") (not $v.weights.s3.uri) -}}
{{- fail "weights.source is s3: weights.s3.uri is missing" -}}
{{- end -}}
{{- if and $v.weights.pvc.subPath (not (has $v.weights.source (list "pvc" "s3"))) -}}
{{- fail (printf "weights.pvc.subPath is %q and weights.source is %s: there is no claim that it could be a path of" $v.weights.pvc.subPath $v.weights.source) -}}
{{- end -}}
{{- if and (eq $v.weights.source "init") (not $v.weights.initContainers) -}}
{{- fail "weights.source is init: weights.initContainers are missing, and nothing would fill /models" -}}
{{- end -}}
{{- if and $v.gatewayApi.enabled (not (or $v.gatewayApi.grpc $v.gatewayApi.http)) -}}
{{- fail "gatewayApi.enabled is true, and gatewayApi.grpc and gatewayApi.http are both false: there would be no route" -}}
{{- end -}}
{{- if and $v.gatewayApi.enabled (not $v.gatewayApi.parentRefs) -}}
{{- fail "gatewayApi.enabled needs gatewayApi.parentRefs" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts" -}}
{{- end -}}
{{- end -}}
