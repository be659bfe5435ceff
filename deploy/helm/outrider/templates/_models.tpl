{{/* How models get into the pods. */}}

{{/* The volume. Takes root. */}}
{{- define "outrider.modelVolume" -}}
{{- $volume := .root.Values.models.volume -}}
- name: models
{{- if eq .root.Values.models.mode "pod" }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $volume.storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ $volume.size }}}}
{{- else }}
  persistentVolumeClaim:
    claimName: {{ $volume.existingClaim | default (printf "%s-models" (include "outrider.fullname" .root)) }}
{{- end }}
{{- end }}

{{/*
Downloads models: arguments are triples of id, commit and directory. A directory is whole once .complete lies in it. The
digest is computed here and kept beside the weights, so that no worker has to read them twice.
*/}}
{{- define "outrider.downloadScript" -}}
set -eu
while [ "$#" -gt 0 ]; do
  if [ ! -f "$3/.complete" ]; then
    hf download "$1" --revision "$2" --local-dir "$3" ${EXCLUDE:+--exclude "$EXCLUDE"} \
      --exclude '*/*' --exclude '*.bin' --exclude '*.pt' --exclude '*.pth' --exclude '*.gguf' --exclude 'consolidated*'
    python -c 'import pathlib, sys; from services.engine.digest import model_digest; model_digest(pathlib.Path(sys.argv[1]))' "$3"
    touch "$3/.complete"
  fi
  shift 3
done
{{- end }}

{{/* A container that downloads. Takes root, name, models, and weights: whether they are wanted. */}}
{{- define "outrider.downloadContainer" -}}
name: {{ .name }}
image: {{ include "outrider.image" (dict "root" .root "part" .root.Values.coordinator "gpus" 0) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext: {{- include "outrider.containerSecurity" . | nindent 2 }}
command: [sh, -c, {{ include "outrider.downloadScript" . | quote }}, download]
args:
{{- range .models }}
  - {{ .model | quote }}
  - {{ .revision | quote }}
  - {{ .path | quote }}
{{- end }}
env:
  - {name: HF_HOME, value: /tmp/huggingface}
  - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
{{- if not .weights }}
  - {name: EXCLUDE, value: "*.safetensors"}
{{- end }}
{{- with .root.Values.models.hubEndpoint }}
  - {name: HF_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .root.Values.models.tokenSecret }}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.root.Values.models.tokenSecretKey }}}}
{{- end }}
resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {memory: 4Gi}}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: models, mountPath: /models}
{{- end }}

{{/*
Init containers that see to it that `models` are there: mode shared waits for the job, mode pod downloads.
Takes root, models and weights. Empty where nothing is downloaded.
*/}}
{{- define "outrider.modelInit" -}}
{{- if and .models .root.Values.models.download }}
initContainers:
{{- if eq .root.Values.models.mode "pod" }}
  - {{- include "outrider.downloadContainer" (merge (dict "name" "download") .) | nindent 4 }}
{{- else }}
  - name: wait-for-models
    image: {{ include "outrider.image" (dict "root" .root "part" .root.Values.coordinator "gpus" 0) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    securityContext: {{- include "outrider.containerSecurity" . | nindent 6 }}
    command: [sh, -c, 'for path; do until [ -f "$path/.complete" ]; do sleep 2; done; done', wait]
    args:
    {{- range .models }}
      - {{ .path | quote }}
    {{- end }}
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}
{{- end }}
