{{/*
A worker's pod, draft or target. Takes root, pool, component, part, port, service, hasModel, hasDirectory, and draftTarget:
the part whose model this one's is a head of.
*/}}
{{- define "outrider.workerPod" -}}
{{- $gpus := int .part.gpu.count -}}
{{- $parallel := int .part.tensorParallelSize | default (max 1 $gpus) -}}
{{- $context := dict "root" .root "component" .component "part" .part "pool" .pool.name -}}
metadata:
  labels: {{- include "outrider.podLabels" $context | nindent 4 }}
  {{- with .part.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "outrider.serviceAccount" $context }}
  automountServiceAccountToken: false
  # Variables such as OUTRIDER_TARGET_SERVICE_HOST, which a service would refuse as unknown settings.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "outrider.grace" .part }}
  securityContext: {{- include "outrider.podSecurity" . | nindent 4 }}
  {{- include "outrider.scheduling" $context | nindent 2 }}
  {{- $models := list }}
  {{- range compact (list (ternary .part dict .hasModel) .draftTarget) }}
  {{- if include "outrider.isHubId" . }}
  {{- $models = append $models (dict "model" .model "revision" .revision "path" (include "outrider.modelPath" .)) }}
  {{- end }}
  {{- end }}
  {{- include "outrider.modelInit" (dict "root" .root "models" $models "weights" true) | nindent 2 }}
  containers:
    - name: {{ .component }}
      image: {{ include "outrider.image" (dict "root" .root "part" .part "gpus" $gpus) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext: {{- include "outrider.containerSecurity" . | nindent 8 }}
      ports:
        - {name: grpc, containerPort: {{ .port }}}
        - {name: probe, containerPort: 8081}
        - {name: metrics, containerPort: 9090}
      env:
        {{- include "outrider.commonEnv" $context | nindent 8 }}
        - {name: OUTRIDER_PORT, value: {{ .port | quote }}}
        - {name: OUTRIDER_DEVICE, value: {{ ternary "cuda" "cpu" (gt $gpus 0) }}}
        - {name: OUTRIDER_TENSOR_PARALLEL_SIZE, value: {{ $parallel | quote }}}
        - {name: OUTRIDER_CACHE_DIR, value: /tmp/outrider}
        {{- if .hasModel }}
        - {name: OUTRIDER_MODEL, value: {{ include "outrider.modelPath" .part | quote }}}
        - {name: OUTRIDER_DTYPE, value: {{ .part.dtype }}}
        {{- with include "outrider.modelName" .part }}
        - {name: OUTRIDER_MODEL_NAME, value: {{ . | quote }}}
        {{- end }}
        {{- end }}
        {{- with .draftTarget }}
        - {name: OUTRIDER_DRAFT_TARGET, value: {{ include "outrider.modelPath" . | quote }}}
        {{- end }}
        {{- if eq .component "draft" }}
        - {name: OUTRIDER_DRAFTER, value: {{ .part.drafter | quote }}}
        {{- end }}
        {{- if .root.Values.models.offline }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- else if .root.Values.models.hubEndpoint }}
        - {name: HF_ENDPOINT, value: {{ .root.Values.models.hubEndpoint | quote }}}
        {{- end }}
        {{- include "outrider.extraEnv" .part | nindent 8 }}
      {{- include "outrider.probes" (dict "service" .service "started" .service "seconds" .part.startupSeconds) | nindent 6 }}
      lifecycle: {{- include "outrider.lifecycle" .part | nindent 8 }}
      resources: {{- include "outrider.workerResources" .part | nindent 8 }}
      volumeMounts:
        {{- include "outrider.mounts" $context | nindent 8 }}
        {{- if .hasDirectory }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if gt $parallel 1 }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
  volumes:
    {{- include "outrider.volumes" $context | nindent 4 }}
    {{- if .hasDirectory }}
    {{- include "outrider.modelVolume" $context | nindent 4 }}
    {{- end }}
    {{- if gt $parallel 1 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .part.shmSize }}}
    {{- end }}
{{- end }}

{{/* Resources with the GPUs as limit and request, which must be equal. */}}
{{- define "outrider.workerResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpu.count) 0 -}}
  {{- range $kind := list "limits" "requests" -}}
    {{- $_ := set $resources $kind (merge (dict $.gpu.resourceName (int $.gpu.count)) (get $resources $kind | default dict)) -}}
  {{- end -}}
{{- end -}}
{{- toYaml $resources }}
{{- end }}

{{/* The headless Service by which coordinators find the workers. Takes root, pool, component and port. */}}
{{- define "outrider.workerService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "outrider.workerName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "outrider.labels" (dict "root" .root "component" .component "pool" .pool.name) | nindent 4 }}
spec:
  clusterIP: None
  selector: {{- include "outrider.selector" (dict "root" .root "component" .component "pool" .pool.name) | nindent 4 }}
  ports:
    - {name: grpc, port: {{ .port }}, targetPort: grpc}
    - {name: metrics, port: 9090, targetPort: metrics}
{{- end }}
