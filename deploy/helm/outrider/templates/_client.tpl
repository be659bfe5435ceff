{{/* What a client must show and say: the pod of `helm test`, and the commands of the notes. Each takes the root. */}}

{{/* Name of the model to ask for; empty where there is only one. */}}
{{- define "outrider.clientModel" -}}
{{- $names := list -}}
{{- range (include "outrider.pools" . | fromJson).pools }}{{ $names = append $names (include "outrider.servedName" .target) }}{{ end -}}
{{- if gt (len (uniq $names)) 1 }}{{ first $names }}{{ end -}}
{{- end }}

{{/* Whether clients need a certificate. */}}
{{- define "outrider.clientsNeedCertificates" -}}
{{- if and .Values.tls.enabled .Values.tls.clients.caSecret }}true{{ end -}}
{{- end }}

{{/* Why `helm test` could only fail, as a sentence; empty where it can run. */}}
{{- define "outrider.whyNoTest" -}}
{{- $missing := list -}}
{{- if and .Values.auth.apiKeysSecret (not .Values.test.apiKeySecret) -}}
  {{- $missing = append $missing "an API key (test.apiKeySecret)" -}}
{{- end -}}
{{- if and (include "outrider.clientsNeedCertificates" .) (not .Values.test.clientCertSecret) -}}
  {{- $missing = append $missing "a client certificate (test.clientCertSecret)" -}}
{{- end -}}
{{- with $missing }}There is no helm test: it would need {{ join " and " . }}.{{ end -}}
{{- end }}

{{/* A command that prints what a Secret holds. Takes root, secret and key. */}}
{{- define "outrider.printSecret" -}}
kubectl --namespace {{ .root.Release.Namespace }} get secret {{ .secret }} -o jsonpath='{.data.{{ .key | replace "." "\\." }}}' | base64 -d
{{- end }}
