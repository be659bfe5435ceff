{{/* Settings that the values hand on to a service: it knows them, and they have its types. */}}

{{/* Takes root, where, name of the service, part, and owned: what the chart sets itself. */}}
{{- define "outrider.validateSettings" -}}
{{- $owned := concat .owned (list "probe_port" "metrics_port" "drain_s" "reflection" "log_level" "log_format" "trace_endpoint" "trace_sample" "tls_cert" "tls_key" "tls_ca" "tls_client_ca" "insecure" "insecure_redis" "api_keys_file" "max_connection_age_s") -}}
{{- $known := get (.root.Files.Get "files/settings.json" | fromJson) .name -}}
{{- range $name := keys .part.settings | sortAlpha -}}
  {{- if has $name $owned -}}
    {{- fail (printf "%s%s.settings.%s: the chart sets this from other values" ($.where | default "") $.name $name) -}}
  {{- end -}}
  {{- include "outrider.validateSetting" (merge (dict "setting" $name "value" (get $.part.settings $name) "known" $known) $) -}}
{{- end -}}
{{- range .part.extraEnv -}}
  {{- if hasPrefix "OUTRIDER_" .name -}}
    {{- fail (printf "%s%s.extraEnv: %s belongs into %s.settings" ($.where | default "") $.name .name $.name) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* One of them. Takes what outrider.validateSettings takes, setting, value, and known: types or choices by name. */}}
{{- define "outrider.validateSetting" -}}
{{- $place := printf "%s%s.settings.%s" (.where | default "") .name .setting -}}
{{- if not (hasKey .known .setting) -}}
  {{- fail (printf "%s: no such setting; outrider serve %s --help lists them" $place .name) -}}
{{- end -}}
{{- $kind := get .known .setting -}}
{{- $text := include "outrider.scalar" .value -}}
{{- $forms := dict "int" "^[+-]?[0-9]+$" "float" "^[+-]?([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([eE][+-]?[0-9]+)?$" "bool" "^(?i)(1|true|yes|on|0|false|no|off)$" -}}
{{- if kindIs "slice" $kind -}}
  {{- if not (has $text $kind) -}}{{- fail (printf "%s: %q is not one of %s" $place $text (join ", " $kind)) -}}{{- end -}}
{{- else if not (regexMatch (get $forms $kind) $text) -}}
  {{- fail (printf "%s: %q is not a valid %s" $place $text $kind) -}}
{{- end -}}
{{- end }}

{{/* What is simulated drafts for what is simulated only: it has no real vocabulary. Takes where, part and target. */}}
{{- define "outrider.validateSimulatedDraft" -}}
{{- $last := last (splitList "," .part.drafter) -}}
{{- $real := ne .target.model "simulated" -}}
{{- if and $real (eq $last "simulated") -}}
  {{- fail (printf "%sdraft.drafter: %s cannot draft for a real target, whose vocabulary it lacks; use ngram or suffix, or a drafter with a model" .where .part.drafter) -}}
{{- else if and (include "outrider.draftHasModel" .part) (eq .part.model "simulated") -}}
  {{- if $real -}}
    {{- fail (printf "%sdraft.model: a simulated model cannot draft for a real target, whose vocabulary it lacks; name a model" .where) -}}
  {{- else if ne $last "staged" -}}
    {{- fail (printf "%sdraft.drafter: %s cannot run a simulated model; set draft.drafter=simulated" .where .part.drafter) -}}
  {{- end -}}
{{- end -}}
{{- $stage := get .part.settings "staged_drafter" | default "suffix" -}}
{{- if and $real (eq $last "staged") (eq $stage "simulated") -}}
  {{- fail (printf "%sdraft.settings.staged_drafter: simulated cannot draft for a real model; use suffix, ngram or model" .where) -}}
{{- else if and (eq $last "staged") (ne (eq $stage "model") (ne (get .part.settings "staged_model" | default "") "")) -}}
  {{- fail (printf "%sdraft.settings.staged_model: it goes with draft.settings.staged_drafter=model, and must be given there" .where) -}}
{{- end -}}
{{- end }}
