{{/* What the address of an external Redis, its ports and its certificates say of each other. */}}

{{- define "outrider.validateExternalRedis" -}}
{{- $external := .Values.redis.external -}}
{{- $sentinel := contains "+sentinel://" $external.url -}}
{{- if $external.url -}}
  {{- $hosts := splitList "," (include "outrider.externalRedisHosts" .) -}}
  {{- range $hosts -}}
    {{- if not (regexMatch "^([^:\\[\\]]+|\\[[0-9a-fA-F:.]+\\])(:[0-9]{1,5})?$" .) -}}
      {{- fail (printf "redis.external.url: %q is neither HOST nor HOST:PORT" .) -}}
    {{- end -}}
  {{- end -}}
  {{- if and $sentinel (not (regexMatch "^[^:]*://[^/?]+/[^/?]+" $external.url)) -}}
    {{- fail "redis.external.url: Sentinels need the name of the service, as in rediss+sentinel://HOST:26379,HOST:26379/SERVICE/0" -}}
  {{- else if and (not $sentinel) (gt (len $hosts) 1) -}}
    {{- fail "redis.external.url: several hosts are Sentinels: use rediss+sentinel://HOST:26379,HOST:26379/SERVICE/0" -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not $external.ports) -}}
  {{- if $external.existingSecret -}}
    {{- fail "redis.external.ports: the network policy cannot read the address in a Secret; list the ports in it, for Sentinels those of the servers too, or set networkPolicy.enabled=false" -}}
  {{- else if $sentinel -}}
    {{- fail "redis.external.ports: the network policy cannot ask Sentinels where the servers are; list the servers' ports, such as 6379, or set networkPolicy.enabled=false" -}}
  {{- end -}}
{{- end -}}
{{- range $name, $option := dict "caSecret" "ssl_ca_certs=" "clientCertSecret" "ssl_certfile=" -}}
  {{- if get $external $name -}}
    {{- if regexMatch "^redis(\\+sentinel)?://" $external.url -}}
      {{- fail (printf "redis.external.%s: certificates need rediss:// or rediss+sentinel:// in redis.external.url" $name) -}}
    {{- else if contains $option $external.url -}}
      {{- fail (printf "redis.external.%s: redis.external.url has %s already" $name (trimSuffix "=" $option)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}
