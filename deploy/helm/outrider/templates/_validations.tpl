{{/* Values that the schema can't judge alone: each failure is a sentence that names the value and the way out. */}}

{{- define "outrider.validate" -}}
{{- include "outrider.validateNames" . -}}
{{- include "outrider.validatePools" . -}}
{{- include "outrider.validateRedis" . -}}
{{- include "outrider.validateTls" . -}}
{{- include "outrider.validateAutoscaling" . -}}
{{- include "outrider.validateRoutes" . -}}
{{- include "outrider.validateRollingUpdate" (dict "name" "coordinator" "part" .Values.coordinator) -}}
{{- include "outrider.validateGrace" (dict "name" "coordinator" "part" .Values.coordinator) -}}
{{- include "outrider.validateSettings" (dict "root" . "name" "coordinator" "part" .Values.coordinator "owned" (list "host" "port" "redis_url" "targets" "drafts" "tokenizer")) -}}
{{- if and .Values.auth.apiKeysSecret (not .Values.tls.enabled) -}}
  {{- fail "auth.apiKeysSecret: keys would travel in plaintext; set tls.enabled as well" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.coordinatorName) -}}
  {{- fail "serviceAccount.coordinatorName: with serviceAccount.create false, name an account that may list and watch EndpointSlices" -}}
{{- end -}}
{{- end }}

{{- define "outrider.validatePools" -}}
{{- $names := list -}}{{- $paths := dict -}}
{{- range (include "outrider.pools" . | fromJson).pools -}}
  {{- $where := ternary "" (printf "pool %s: " .name) (eq .infix "") -}}
  {{- if has .name $names -}}{{- fail (printf "pools: %s is the name of several" .name) -}}{{- end -}}
  {{- $names = append $names .name -}}
  {{- if not .target.model -}}
    {{- fail (printf "%starget.model: name the model that verifies: a Hugging Face id, a directory below /models, or simulated" $where) -}}
  {{- end -}}
  {{- include "outrider.validateModel" (dict "where" $where "name" "target" "part" .target "root" $) -}}
  {{- include "outrider.validateGpus" (dict "where" $where "name" "target" "part" .target) -}}
  {{- include "outrider.validateGrace" (dict "where" $where "name" "target" "part" .target) -}}
  {{- include "outrider.validateSettings" (dict "root" $ "where" $where "name" "target" "part" .target "owned" (list "host" "port" "model" "model_name" "dtype" "device" "tensor_parallel_size")) -}}
  {{- $served := include "outrider.servedName" .target -}}
  {{- $path := include "outrider.modelPath" .target -}}
  {{- if ne (get $paths $served | default $path) $path -}}
    {{- fail (printf "%starget.modelName: %s is already the name of another model; choose one of its own" $where $served) -}}
  {{- end -}}
  {{- $_ := set $paths $served $path -}}
  {{- if .draft.enabled -}}
    {{- include "outrider.validateDraft" (dict "where" $where "part" .draft "target" .target "root" $) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateDraft" -}}
{{- $chain := splitList "," .part.drafter -}}
{{- if ne (len $chain) (len (uniq $chain)) -}}
  {{- fail (printf "%sdraft.drafter: in %s one stands twice" .where .part.drafter) -}}
{{- end -}}
{{- if include "outrider.draftHasModel" .part -}}
  {{- if not .part.model -}}
    {{- fail (printf "%sdraft.model: the drafter %s needs a model: name one, choose a drafter without (ngram, suffix), or set draft.enabled=false" .where .part.drafter) -}}
  {{- end -}}
  {{- include "outrider.validateModel" (dict "where" .where "name" "draft" "part" .part "root" .root) -}}
{{- else if gt (int .part.gpu.count) 0 -}}
  {{- fail (printf "%sdraft.gpu.count: the drafter %s computes on the CPU; set draft.gpu.count=0" .where .part.drafter) -}}
{{- end -}}
{{- include "outrider.validateGpus" (dict "where" .where "name" "draft" "part" .part) -}}
{{- $parallel := int .part.tensorParallelSize | default (int .part.gpu.count) -}}
{{- if and (gt $parallel 1) (ne (last (splitList "," .part.drafter)) "model") -}}
  {{- fail (printf "%sdraft.tensorParallelSize: the drafter %s cannot be cut over %d GPUs; set draft.tensorParallelSize=1 and draft.gpu.count=1" .where .part.drafter $parallel) -}}
{{- end -}}
{{- if and (gt $parallel 1) (eq .part.dtype "int8") -}}
  {{- fail (printf "%sdraft.dtype: rounded weights cannot be cut over %d GPUs; set draft.tensorParallelSize=1 and draft.gpu.count=1, or another dtype" .where $parallel) -}}
{{- end -}}
{{- include "outrider.validateGrace" (dict "where" .where "name" "draft" "part" .part) -}}
{{- $owned := list "host" "port" "model" "model_name" "dtype" "device" "tensor_parallel_size" "drafter" -}}
{{- if include "outrider.draftIsHead" .part }}{{ $owned = append $owned "draft_target" }}{{ end -}}
{{- include "outrider.validateSettings" (dict "root" .root "where" .where "name" "draft" "part" .part "owned" $owned) -}}
{{- include "outrider.validateRollingUpdate" (dict "where" .where "name" "draft" "part" .part) -}}
{{- if and (ne .part.model "simulated") (eq .target.model "simulated") (include "outrider.draftHasModel" .part) -}}
  {{- fail (printf "%sdraft.model: a simulated target has no vocabulary that a real draft could share; set draft.drafter=simulated" .where) -}}
{{- end -}}
{{- include "outrider.validateSimulatedDraft" . -}}
{{- end }}

{{- define "outrider.validateRollingUpdate" -}}
{{- $none := list "0" "0%" -}}
{{- if and (has (toString .part.rollingUpdate.maxSurge) $none) (has (toString .part.rollingUpdate.maxUnavailable) $none) -}}
  {{- fail (printf "%s%s.rollingUpdate: with maxSurge and maxUnavailable both 0 no update could ever begin" (.where | default "") .name) -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateModel" -}}
{{- $model := .part.model -}}
{{- if eq $model "sample" -}}
  {{- fail (printf "%s%s.model: sample is for one machine; on a cluster name a Hugging Face id or a directory below /models" .where .name) -}}
{{- else if eq $model "simulated" -}}
  {{- if gt (int .part.gpu.count) 0 -}}
    {{- fail (printf "%s%s.gpu.count: a simulated model needs no GPU; set %s.gpu.count=0" .where .name .name) -}}
  {{- else if gt (int .part.tensorParallelSize) 1 -}}
    {{- fail (printf "%s%s.tensorParallelSize: a simulated model cannot be cut; set %s.tensorParallelSize=0" .where .name .name) -}}
  {{- end -}}
{{- else if hasPrefix "/" $model -}}
  {{- if not (hasPrefix "/models/" $model) -}}
    {{- fail (printf "%s%s.model: %s is not below /models, where the volume of models is mounted" .where .name $model) -}}
  {{- end -}}
{{- else if not (contains "/" $model) -}}
  {{- fail (printf "%s%s.model: %s is neither org/name nor a directory below /models" .where .name $model) -}}
{{- else if not .part.revision -}}
  {{- fail (printf "%s%s.revision: pin the commit of %s, so that all workers serve the same weights" .where .name $model) -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateGpus" -}}
{{- $size := int .part.tensorParallelSize -}}
{{- $gpus := int .part.gpu.count -}}
{{- if and (gt $gpus 0) (gt $size 0) -}}
  {{- if ne (mod $gpus $size) 0 -}}
    {{- fail (printf "%s%s.tensorParallelSize: %d does not divide the %d GPUs of a pod (%s.gpu.count)" .where .name $size $gpus .name) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateGrace" -}}
{{- $needed := add .part.preStopSeconds .part.drainSeconds -}}
{{- $grace := int .part.terminationGracePeriodSeconds -}}
{{- if and (gt $grace 0) (le $grace (int $needed)) -}}
  {{- fail (printf "%s%s.terminationGracePeriodSeconds: %d s end before preStopSeconds + drainSeconds, %d s, have passed" (.where | default "") .name $grace (int $needed)) -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateRedis" -}}
{{- $external := or .Values.redis.external.url .Values.redis.external.existingSecret -}}
{{- if and (not .Values.redis.enabled) (not $external) -}}
  {{- fail "redis: sessions need a Redis: set redis.enabled=true, or name another by redis.external.url or redis.external.existingSecret" -}}
{{- else if and .Values.redis.enabled $external -}}
  {{- fail "redis.external: set redis.enabled=false to use it; with both it is unclear which Redis holds the sessions" -}}
{{- else if and .Values.redis.external.url .Values.redis.external.existingSecret -}}
  {{- fail "redis.external: url and existingSecret exclude each other" -}}
{{- end -}}
{{- if and (regexMatch "^redis(\\+sentinel)?://" .Values.redis.external.url) .Values.tls.enabled (not .Values.redis.external.insecure) -}}
  {{- fail "redis.external.url: redis:// and redis+sentinel:// send sessions in plaintext; use rediss:// or rediss+sentinel://, or set redis.external.insecure=true" -}}
{{- end -}}
{{- if not .Values.redis.enabled }}{{ include "outrider.validateExternalRedis" . }}{{ end -}}
{{- end }}

{{- define "outrider.validateTls" -}}
{{- if .Values.tls.enabled -}}
  {{- if .Values.tls.certManager.enabled -}}
    {{- include "outrider.requireApi" (dict "root" . "api" "cert-manager.io/v1/Certificate" "needed" "tls.certManager") -}}
    {{- include "outrider.validateDurations" . -}}
  {{- else -}}
    {{- $parts := list "coordinator" "target" -}}
    {{- range (include "outrider.pools" . | fromJson).pools -}}{{- if .draft.enabled -}}{{- $parts = append $parts "draft" -}}{{- end -}}{{- end -}}
    {{- if .Values.redis.enabled -}}{{- $parts = append $parts "redis" -}}{{- end -}}
    {{- range uniq $parts -}}
      {{- if not (get $.Values.tls.existingSecrets .) -}}
        {{- fail (printf "tls: certificates are missing: set tls.certManager.enabled=true, or name a Secret in tls.existingSecrets.%s, or set tls.enabled=false for plaintext" .) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- else if .Values.tls.clients.caSecret -}}
  {{- fail "tls.clients.caSecret: clients' certificates need tls.enabled" -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateAutoscaling" -}}
{{- $wanted := false -}}
{{- range (include "outrider.pools" . | fromJson).pools -}}
  {{- if or .target.autoscaling.enabled (and .draft.enabled .draft.autoscaling.enabled) -}}{{- $wanted = true -}}{{- end -}}
  {{- range $name, $part := dict "target" .target "draft" .draft -}}
    {{- if gt (int $part.autoscaling.minReplicas) (int $part.autoscaling.maxReplicas) -}}
      {{- fail (printf "%s.autoscaling: minReplicas is above maxReplicas" $name) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if $wanted -}}
  {{- include "outrider.requireApi" (dict "root" . "api" "keda.sh/v1alpha1/ScaledObject" "needed" "autoscaling of workers, by KEDA,") -}}
  {{- if not .Values.autoscaling.prometheusAddress -}}
    {{- fail "autoscaling.prometheusAddress: workers are scaled by metrics that KEDA reads from Prometheus; name its address" -}}
  {{- end -}}
{{- end -}}
{{- if .Values.coordinator.autoscaling.enabled -}}
  {{- if gt (int .Values.coordinator.autoscaling.minReplicas) (int .Values.coordinator.autoscaling.maxReplicas) -}}
    {{- fail "coordinator.autoscaling: minReplicas is above maxReplicas" -}}
  {{- end -}}
  {{- if not (dig "requests" "cpu" "" .Values.coordinator.resources) -}}
    {{- fail "coordinator.resources.requests.cpu: scaling by CPU counts in shares of it" -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{- define "outrider.validateRoutes" -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
  {{- fail "ingress.host: name the host that clients use" -}}
{{- end -}}
{{- if and .Values.ingress.enabled .Values.auth.apiKeysSecret (not .Values.ingress.tlsSecret) -}}
  {{- fail "ingress.tlsSecret: without a certificate of the host, API keys would reach the ingress in plaintext; name its Secret" -}}
{{- end -}}
{{- if .Values.gateway.enabled -}}
  {{- include "outrider.requireApi" (dict "root" . "api" "gateway.networking.k8s.io/v1/GRPCRoute" "needed" "gateway") -}}
  {{- if not .Values.gateway.parentRefs -}}
    {{- fail "gateway.parentRefs: name the Gateway that the route hangs on" -}}
  {{- end -}}
{{- end -}}
{{- end }}
