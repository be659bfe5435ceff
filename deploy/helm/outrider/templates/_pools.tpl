{{/* Pools: pairs of a target and a draft, and where their models lie. */}}

{{/*
All pools as JSON {"pools": [{name, infix, target, draft}]}: the values' own pair, or each entry of `pools` over it.
`infix` stands in the names of a pool's objects; the single pool has none.
*/}}
{{- define "outrider.pools" -}}
{{- $pools := list -}}
{{- if .Values.pools -}}
  {{- range .Values.pools -}}
    {{- $target := mergeOverwrite (deepCopy $.Values.target) (deepCopy (.target | default dict)) -}}
    {{- $draft := mergeOverwrite (deepCopy $.Values.draft) (deepCopy (.draft | default dict)) -}}
    {{- $pools = append $pools (dict "name" .name "infix" (printf "-%s" .name) "target" $target "draft" $draft) -}}
  {{- end -}}
{{- else -}}
  {{- $pools = append $pools (dict "name" "default" "infix" "" "target" .Values.target "draft" .Values.draft) -}}
{{- end -}}
{{- dict "pools" $pools | toJson -}}
{{- end }}

{{/* Name of a worker's objects. Takes root, pool and component. */}}
{{- define "outrider.workerName" -}}
{{ include "outrider.fullname" .root }}{{ .pool.infix }}-{{ .component }}
{{- end }}

{{/* Whether a model is a Hugging Face id: org/name. */}}
{{- define "outrider.isHubId" -}}
{{- if and .model (ne .model "simulated") (not (hasPrefix "/" .model)) }}true{{ end -}}
{{- end }}

{{/* What the service is told: the directory that a hub id is downloaded to, else the model as it is. */}}
{{- define "outrider.modelPath" -}}
{{- if include "outrider.isHubId" . -}}
/models/{{ .model | replace "/" "--" }}/{{ .revision }}
{{- else -}}
{{ .model }}
{{- end -}}
{{- end }}

{{- define "outrider.modelName" -}}
{{- .modelName | default (ternary .model "" (eq (include "outrider.isHubId" .) "true")) -}}
{{- end }}

{{/* The name by which requests know a target's model: what it tells of itself when it is given none. */}}
{{- define "outrider.servedName" -}}
{{- include "outrider.modelName" . | default (base (include "outrider.modelPath" .)) -}}
{{- end }}

{{/* Whether a draft needs a model. */}}
{{- define "outrider.draftHasModel" -}}
{{- $last := last (splitList "," .drafter) -}}
{{- if has $last (list "model" "features" "mtp" "staged") }}true{{ end -}}
{{- end }}

{{/* Whether a draft's model stands on its target's embedding and head, and is nothing without them. */}}
{{- define "outrider.draftIsHead" -}}
{{- $last := last (splitList "," .drafter) -}}
{{- if has $last (list "features" "mtp") }}true{{ end -}}
{{- end }}

{{/* The parts of a pool that load a model, as JSON {"parts": [...]}. */}}
{{- define "outrider.modelParts" -}}
{{- $parts := list .target -}}
{{- if and .draft.enabled (include "outrider.draftHasModel" .draft) }}{{ $parts = append $parts .draft }}{{ end -}}
{{- dict "parts" $parts | toJson -}}
{{- end }}

{{/* What is to be downloaded, as JSON {"models": [{model, revision, path}]}, each once. */}}
{{- define "outrider.downloads" -}}
{{- $models := dict -}}
{{- range (include "outrider.pools" . | fromJson).pools -}}
  {{- range (include "outrider.modelParts" . | fromJson).parts -}}
    {{- if include "outrider.isHubId" . -}}
      {{- $path := include "outrider.modelPath" . -}}
      {{- $_ := set $models $path (dict "model" .model "revision" .revision "path" $path) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $list := list -}}
{{- range $path := keys $models | sortAlpha }}{{ $list = append $list (get $models $path) }}{{ end -}}
{{- dict "models" $list | toJson -}}
{{- end }}

{{/* Whether any pod needs the volume of models: whenever one is neither simulated nor missing. */}}
{{- define "outrider.needsVolume" -}}
{{- range (include "outrider.pools" . | fromJson).pools -}}
  {{- range (include "outrider.modelParts" . | fromJson).parts -}}
    {{- if ne .model "simulated" }}true{{ end -}}
  {{- end -}}
{{- end -}}
{{- end }}
