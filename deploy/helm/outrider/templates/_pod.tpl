{{/* What the pods have in common. */}}

{{- define "outrider.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "outrider.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where pods may run. Takes root, component, part, and pool where it belongs to one. */}}
{{- define "outrider.scheduling" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .part.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- $spread := .part.topologySpread | default dict }}
{{- if or $spread.zone $spread.host }}
topologySpreadConstraints:
{{- range $key, $when := dict "topology.kubernetes.io/zone" $spread.zone "kubernetes.io/hostname" $spread.host }}
{{- if $when }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: {{ $when }}
    labelSelector:
      matchLabels: {{- include "outrider.selector" $ | nindent 8 }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Seconds until the kubelet kills: longer than preStop and drain together. Takes a part. */}}
{{- define "outrider.grace" -}}
{{- .terminationGracePeriodSeconds | default (add .preStopSeconds .drainSeconds 15) -}}
{{- end }}

{{/*
Probes of the kubelet on the plaintext health port. "" is whether it is alive, the service's name whether it is ready.
A worker has started once its model is loaded; a coordinator once it lives: ready it is only with a target.
Takes service, started and seconds.
*/}}
{{- define "outrider.probes" -}}
startupProbe:
  grpc: {port: 8081, service: {{ .started | quote }}}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ divf .seconds 5 | ceil | int }}
livenessProbe:
  grpc: {port: 8081, service: ""}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 8081, service: {{ .service | quote }}}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* Waits until the pod has left the endpoints everywhere; then comes SIGTERM, which drains. Takes a part. */}}
{{- define "outrider.lifecycle" -}}
preStop:
  exec:
    command: [sleep, {{ .preStopSeconds | int | quote }}]
{{- end }}

{{/* Settings that all services share, and the component's own. Takes root, component and part. */}}
{{- define "outrider.commonEnv" -}}
- {name: OUTRIDER_HOST, value: 0.0.0.0}
- {name: OUTRIDER_PROBE_PORT, value: "8081"}
- {name: OUTRIDER_METRICS_PORT, value: "9090"}
- {name: OUTRIDER_DRAIN_S, value: {{ .part.drainSeconds | int | quote }}}
- {name: OUTRIDER_REFLECTION, value: "false"}
- {name: OUTRIDER_LOG_LEVEL, value: {{ .root.Values.logging.level }}}
- {name: OUTRIDER_LOG_FORMAT, value: {{ .root.Values.logging.format }}}
{{- with .root.Values.logging.traceEndpoint }}
- {name: OUTRIDER_TRACE_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- if .root.Values.tls.enabled }}
- {name: OUTRIDER_TLS_CERT, value: /etc/outrider/tls/tls.crt}
- {name: OUTRIDER_TLS_KEY, value: /etc/outrider/tls/tls.key}
- {name: OUTRIDER_TLS_CA, value: /etc/outrider/tls/ca.crt}
{{- else }}
- {name: OUTRIDER_INSECURE, value: "true"}
{{- end }}
{{- end }}

{{/* Settings and variables that the values add. Takes a part. */}}
{{- define "outrider.extraEnv" -}}
{{- range $name := keys .settings | sortAlpha }}
- {name: OUTRIDER_{{ upper $name }}, value: {{ include "outrider.scalar" (get $.settings $name) | quote }}}
{{- end }}
{{- with .extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Volumes that every pod of a component has. Takes root and component. */}}
{{- define "outrider.volumes" -}}
- name: tmp
  emptyDir: {}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "outrider.tlsSecret" . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "outrider.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/outrider/tls, readOnly: true}
{{- end }}
{{- end }}

{{/* Secret with the certificate of a component. Takes root and component. */}}
{{- define "outrider.tlsSecret" -}}
{{- if .root.Values.tls.certManager.enabled -}}
{{ include "outrider.fullname" .root }}-{{ .component }}-tls
{{- else -}}
{{ get .root.Values.tls.existingSecrets .component }}
{{- end -}}
{{- end }}

{{/* Stops the rendering where the cluster lacks an API. Takes root, api and needed. */}}
{{- define "outrider.requireApi" -}}
{{- if not (.root.Capabilities.APIVersions.Has .api) -}}
{{- fail (printf "%s needs the API %s, which this cluster does not have (helm template: add --api-versions %s)" .needed .api .api) -}}
{{- end -}}
{{- end }}
