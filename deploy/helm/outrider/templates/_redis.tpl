{{/* Redis: its image, and how coordinators reach it. */}}

{{- define "outrider.redisImage" -}}
{{- $image := .Values.redis.image -}}
{{ $image.repository }}{{ ternary (printf "@%s" $image.digest) (printf ":%s" $image.tag) (ne $image.digest "") }}
{{- end }}

{{/* The coordinators' variables for the address of Redis. Kubernetes puts the password into the address. */}}
{{- define "outrider.redisEnv" -}}
{{- $tls := "?ssl_ca_certs=/etc/outrider/tls/ca.crt&ssl_certfile=/etc/outrider/tls/tls.crt&ssl_keyfile=/etc/outrider/tls/tls.key" -}}
{{- $name := printf "%s-redis" (include "outrider.fullname" .) -}}
{{- if .Values.redis.enabled }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.auth.existingSecret | default $name }}, key: {{ .Values.redis.auth.key }}}}
- name: OUTRIDER_REDIS_URL
  value: {{ printf "%s://:$(REDIS_PASSWORD)@%s:6379/0%s" (ternary "rediss" "redis" .Values.tls.enabled) $name (ternary $tls "" .Values.tls.enabled) | quote }}
{{- else if .Values.redis.external.existingSecret }}
- name: OUTRIDER_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.external.existingSecret }}, key: {{ .Values.redis.external.key }}}}
{{- else }}
- {name: OUTRIDER_REDIS_URL, value: {{ .Values.redis.external.url | quote }}}
{{- end }}
{{- if and (not .Values.redis.enabled) .Values.redis.external.insecure }}
- {name: OUTRIDER_INSECURE_REDIS, value: "true"}
{{- end }}
{{- end }}
