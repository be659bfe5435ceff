{{/* Names, labels and images. */}}

{{- define "outrider.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- $full | trunc 28 | trimSuffix "-" -}}
{{- end }}

{{/* Selector labels. Takes root, component, and pool where it belongs to one. */}}
{{- define "outrider.selector" -}}
app.kubernetes.io/name: {{ .root.Values.nameOverride | default .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
outrider/pool: {{ . }}
{{- end }}
{{- end }}

{{/* All labels. Takes what outrider.selector takes. */}}
{{- define "outrider.labels" -}}
{{ include "outrider.selector" . }}
app.kubernetes.io/part-of: outrider
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
Labels of a pod, with the component's own. Without versions: these would restart every pod, and Redis, at each upgrade.
Takes what outrider.selector takes, and part.
*/}}
{{- define "outrider.podLabels" -}}
{{- $labels := include "outrider.selector" . | fromYaml -}}
{{- toYaml (merge $labels (.part.podLabels | default dict) .root.Values.commonLabels) }}
{{- end }}

{{/* An image of the project. Takes root, part, and gpus. */}}
{{- define "outrider.image" -}}
{{- $name := .part.image.repository -}}
{{- with .root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if .part.image.digest -}}
{{ $name }}@{{ .part.image.digest }}
{{- else -}}
{{ $name }}:{{ .root.Values.image.tag | default (printf "%s%s" .root.Chart.AppVersion (ternary "-cuda" "" (gt (int .gpus) 0))) }}
{{- end -}}
{{- end }}

{{- define "outrider.serviceAccount" -}}
{{- $given := .root.Values.serviceAccount -}}
{{- if not $given.create -}}
{{ ternary $given.coordinatorName ($given.workerName | default "default") (eq .component "coordinator") }}
{{- else -}}
{{ include "outrider.fullname" .root }}-{{ ternary "coordinator" "worker" (eq .component "coordinator") }}
{{- end -}}
{{- end }}

{{/* A number or text as it is meant: large numbers must not become 1e+06. */}}
{{- define "outrider.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end }}
