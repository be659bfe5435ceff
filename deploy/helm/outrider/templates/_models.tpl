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
Downloads models: arguments are fours of id, commit, directory, and a pattern of files to leave out beside pickles, or
nothing. A directory is whole once .complete lies in it. The digest is computed here and kept beside the weights, so that
no worker has to read them twice.
*/}}
{{- define "outrider.downloadScript" -}}
set -eu
while [ "$#" -gt 0 ]; do
  if [ ! -f "$3/.complete" ]; then
    hf download "$1" --revision "$2" --local-dir "$3" ${4:+--exclude "$4"} \
      --exclude '*/*' --exclude '*.bin' --exclude '*.pt' --exclude '*.pth' --exclude '*.gguf' --exclude 'consolidated*'
    python -c 'import pathlib, sys; from services.engine.digest import model_digest; model_digest(pathlib.Path(sys.argv[1]))' "$3"
    touch "$3/.complete"
  fi
  shift 4
done
{{- end }}

{{/* A container that downloads. Takes root and models. */}}
{{- define "outrider.downloadContainer" -}}
name: download
image: {{ include "outrider.image" (dict "root" .root "part" .root.Values.coordinator "gpus" 0) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext: {{- include "outrider.containerSecurity" . | nindent 2 }}
command: [sh, -c, {{ include "outrider.downloadScript" . | quote }}, download]
args:
{{- range .models }}
  - {{ .model | quote }}
  - {{ .revision | quote }}
  - {{ .path | quote }}
  - {{ ternary "" "*.safetensors" .weights | quote }}
{{- end }}
env:
  - {name: HF_HOME, value: /tmp/huggingface}
  - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
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
Takes root and models. Empty where nothing is downloaded.
*/}}
{{- define "outrider.modelInit" -}}
{{- if and .models .root.Values.models.download }}
initContainers:
{{- if eq .root.Values.models.mode "pod" }}
  - {{- include "outrider.downloadContainer" . | nindent 4 }}
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

{{/* The pod of the job for all pods. Takes the context of its labels, and models. */}}
{{- define "outrider.downloadPod" -}}
metadata:
  labels: {{- include "outrider.podLabels" . | nindent 4 }}
spec:
  restartPolicy: OnFailure
  serviceAccountName: {{ include "outrider.serviceAccount" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- include "outrider.podSecurity" .root | nindent 4 }}
  {{- include "outrider.scheduling" . | nindent 2 }}
  containers:
    - {{- include "outrider.downloadContainer" . | nindent 6 }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- include "outrider.modelVolume" . | nindent 4 }}
{{- end }}

{{/* Refuses models that nothing would ever put where they are looked for. */}}
{{- define "outrider.validateModelVolumes" -}}
{{- if include "outrider.needsVolume" . -}}
  {{- if and (eq .Values.models.mode "pod") (not .Values.models.download) -}}
    {{- fail "models.download: with models.mode=pod each pod's volume begins empty and only a download fills it; set models.download=true, or models.mode=shared and models.volume.existingClaim" -}}
  {{- end -}}
  {{- range (include "outrider.pools" . | fromJson).pools -}}
    {{- $where := ternary "" (printf "pool %s: " .name) (eq .infix "") -}}
    {{- include "outrider.validatePath" (dict "root" $ "name" (printf "%starget.model" $where) "path" .target.model) -}}
    {{- if and .draft.enabled (include "outrider.draftHasModel" .draft) -}}
      {{- include "outrider.validatePath" (dict "root" $ "name" (printf "%sdraft.model" $where) "path" .draft.model) -}}
      {{- include "outrider.validateModelSettings" (dict "root" $ "where" $where "draft" .draft) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* Takes root, where and draft. */}}
{{- define "outrider.validateModelSettings" -}}
{{- $downloaded := list -}}
{{- range (include "outrider.settingsModels" .draft | fromJson).parts -}}
  {{- $downloaded = append $downloaded (include "outrider.modelPath" .) -}}
{{- end -}}
{{- range $setting := include "outrider.modelSettings" . | fromJsonArray -}}
  {{- $name := printf "%sdraft.settings.%s" $.where $setting -}}
  {{- $path := get $.draft.settings $setting | toString -}}
  {{- if not (has $path (concat $downloaded (list "" "simulated"))) -}}
    {{- if and (not (hasPrefix "/models/" $path)) (or (hasPrefix "/" $path) $.root.Values.models.offline) -}}
      {{- fail (printf "%s: %s is no directory below /models, where models are; name /models/ORG--NAME/COMMIT, which is downloaded, or one that you fill" $name $path) -}}
    {{- end -}}
    {{- include "outrider.validatePath" (dict "root" $.root "name" $name "path" $path) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* A volume of each pod's own begins empty: no directory of one's own is in it. Takes root, name and path. */}}
{{- define "outrider.validatePath" -}}
{{- if and (eq .root.Values.models.mode "pod") (hasPrefix "/" .path) -}}
  {{- $way := ternary "/models/ORG--NAME/COMMIT" "a Hugging Face id and its revision" (contains "settings" .name) -}}
  {{- fail (printf "%s: with models.mode=pod each pod's volume begins empty, and nothing puts %s there; name %s, which is downloaded, or set models.mode=shared" .name .path $way) -}}
{{- end -}}
{{- end }}
