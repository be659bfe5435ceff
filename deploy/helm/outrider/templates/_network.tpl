{{/* Rules that several network policies share. Each takes the root. */}}

{{- define "outrider.metricsIngress" -}}
{{- with .Values.networkPolicy.prometheus }}
- ports: [{port: metrics, protocol: TCP}]
  from: {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}

{{- define "outrider.dnsEgress" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
  {{- with .Values.networkPolicy.dns }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* To the port of the hub or its mirror. */}}
{{- define "outrider.downloadEgress" -}}
{{- $hub := urlParse (.Values.models.hubEndpoint | default "https://huggingface.co") -}}
- to: {{- include "outrider.cidrs" .Values.networkPolicy.downloadCIDRs | nindent 4 }}
  ports: [{port: {{ regexFind ":[0-9]+$" $hub.host | trimPrefix ":" | default (ternary "80" "443" (eq $hub.scheme "http")) }}, protocol: TCP}]
{{- end }}

{{/* To the port of the trace endpoint, 4317 where it names none. */}}
{{- define "outrider.traceEgress" -}}
{{- with .Values.logging.traceEndpoint }}
- ports: [{port: {{ regexFind ":[0-9]+$" (urlParse .).host | trimPrefix ":" | default "4317" }}, protocol: TCP}]
  {{- with $.Values.networkPolicy.traces }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Address ranges as peers. Takes a list. */}}
{{- define "outrider.cidrs" -}}
{{- range . }}
- ipBlock: {cidr: {{ . | quote }}}
{{- end }}
{{- end }}
