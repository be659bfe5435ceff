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
- {name: OUTRIDER_REDIS_URL, value: {{ include "outrider.externalRedisUrl" . | quote }}}
{{- end }}
{{- if and (not .Values.redis.enabled) .Values.redis.external.insecure }}
- {name: OUTRIDER_INSECURE_REDIS, value: "true"}
{{- end }}
{{- end }}

{{/* The address of an external Redis, with the files that the chart mounts for it. */}}
{{- define "outrider.externalRedisUrl" -}}
{{- $options := list -}}
{{- with .Values.redis.external -}}
  {{- if .caSecret }}{{ $options = append $options "ssl_ca_certs=/etc/outrider/redis-ca/ca.crt" }}{{ end -}}
  {{- if .clientCertSecret -}}
    {{- $options = concat $options (list "ssl_certfile=/etc/outrider/redis-cert/tls.crt" "ssl_keyfile=/etc/outrider/redis-cert/tls.key") -}}
  {{- end -}}
  {{- .url -}}
  {{- with $options }}{{ ternary "&" "?" (contains "?" $.Values.redis.external.url) }}{{ join "&" . }}{{ end -}}
{{- end -}}
{{- end }}

{{/* Where coordinators may connect to for an external Redis, as JSON {"ports": [...]}: what url names, and what is added. */}}
{{- define "outrider.externalRedisPorts" -}}
{{- $url := .Values.redis.external.url -}}
{{- $ports := list -}}
{{- range compact (splitList "," (include "outrider.externalRedisHosts" .)) -}}
  {{- $default := ternary "26379" "6379" (contains "+sentinel://" $url) -}}
  {{- $ports = append $ports (regexFind ":[0-9]+$" . | trimPrefix ":" | default $default | int) -}}
{{- end -}}
{{- range .Values.redis.external.ports }}{{ $ports = append $ports (int .) }}{{ end -}}
{{- dict "ports" (uniq $ports) | toJson -}}
{{- end }}

{{/* HOST[:PORT],... of redis.external.url; empty without. */}}
{{- define "outrider.externalRedisHosts" -}}
{{- regexReplaceAll "[/?].*$" (regexReplaceAll "^[^:]*://" .Values.redis.external.url "") "" -}}
{{- end }}

{{/* Volumes and mounts of the files with which coordinators reach an external Redis. */}}
{{- define "outrider.externalRedisVolumes" -}}
{{- if not .Values.redis.enabled -}}
{{- with .Values.redis.external.caSecret }}
- name: redis-ca
  secret: {secretName: {{ . }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- with .Values.redis.external.clientCertSecret }}
- name: redis-cert
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end }}

{{- define "outrider.externalRedisMounts" -}}
{{- if not .Values.redis.enabled -}}
{{- if .Values.redis.external.caSecret }}
- {name: redis-ca, mountPath: /etc/outrider/redis-ca, readOnly: true}
{{- end }}
{{- if .Values.redis.external.clientCertSecret }}
- {name: redis-cert, mountPath: /etc/outrider/redis-cert, readOnly: true}
{{- end }}
{{- end }}
{{- end }}
