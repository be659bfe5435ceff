{{/* Names, labels and durations that Kubernetes or cert-manager would refuse, or that would mean two things. */}}

{{- define "outrider.validateNames" -}}
{{- $full := include "outrider.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
  {{- fail (printf "fullnameOverride: %q cannot begin the names of Services, which are small letters, digits and -, a letter first; set it, or name the release so" $full) -}}
{{- end -}}
{{- if gt (len .Values.nameOverride) 63 -}}{{- fail "nameOverride: it is a label as well, and so has at most 63 characters" -}}{{- end -}}
{{- include "outrider.validateLabels" (dict "name" "commonLabels" "labels" .Values.commonLabels) -}}
{{- include "outrider.validateLabels" (dict "name" "coordinator.podLabels" "labels" .Values.coordinator.podLabels) -}}
{{- range (include "outrider.pools" . | fromJson).pools -}}
  {{- $where := ternary "" (printf "pool %s: " .name) (eq .infix "") -}}
  {{- range $name, $part := dict "target" .target "draft" .draft -}}
    {{- include "outrider.validateLabels" (dict "name" (printf "%s%s.podLabels" $where $name) "labels" $part.podLabels) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* Takes name and labels. */}}
{{- define "outrider.validateLabels" -}}
{{- range $key := keys .labels | sortAlpha -}}
  {{- if or (has $key (list "helm.sh/chart" "outrider/pool")) (regexMatch "^app\\.kubernetes\\.io/(name|instance|component|part-of|version|managed-by)$" $key) -}}
    {{- fail (printf "%s: the chart sets the label %s itself" $.name $key) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* cert-manager's own rules, among them its least duration and its least time before renewal. */}}
{{- define "outrider.validateDurations" -}}
{{- $duration := include "outrider.seconds" .Values.tls.certManager.duration | int -}}
{{- $before := include "outrider.seconds" .Values.tls.certManager.renewBefore | int -}}
{{- if lt $duration 3600 -}}{{- fail "tls.certManager.duration: cert-manager makes certificates for 1h or longer" -}}{{- end -}}
{{- if lt $before 300 -}}{{- fail "tls.certManager.renewBefore: cert-manager renews 5m or longer before the end" -}}{{- end -}}
{{- if ge $before $duration -}}
  {{- fail (printf "tls.certManager.renewBefore: %s is not shorter than tls.certManager.duration, %s" .Values.tls.certManager.renewBefore .Values.tls.certManager.duration) -}}
{{- end -}}
{{- end }}

{{/* Seconds of a duration such as 1h30m. */}}
{{- define "outrider.seconds" -}}
{{- $seconds := 0 -}}
{{- range regexFindAll "[0-9]+[hms]" . -1 -}}
  {{- $seconds = add $seconds (mul (regexFind "[0-9]+" . | int) (get (dict "h" 3600 "m" 60 "s" 1) (regexFind "[hms]" .))) -}}
{{- end -}}
{{- $seconds -}}
{{- end }}
