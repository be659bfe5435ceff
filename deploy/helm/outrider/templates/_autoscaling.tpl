{{/* Autoscaling of workers by KEDA. */}}

{{/* The labels by which Prometheus knows the pods of a set: those of its Service. Takes root, pool and component. */}}
{{- define "outrider.metricLabels" -}}
namespace="{{ .root.Release.Namespace }}",service="{{ include "outrider.workerName" . }}"
{{- end }}

{{/*
Each trigger is a sum over the workers, and its threshold is what one worker should have of it: KEDA divides.
Takes root, pool, component, kind, part and triggers: {name: {query, threshold}}.
*/}}
{{- define "outrider.scaledObject" -}}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "outrider.workerName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "outrider.labels" (dict "root" .root "component" .component "pool" .pool.name) | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: {{ .kind }}, name: {{ include "outrider.workerName" . }}}
  minReplicaCount: {{ .part.autoscaling.minReplicas }}
  maxReplicaCount: {{ .part.autoscaling.maxReplicas }}
  pollingInterval: {{ .root.Values.autoscaling.pollingSeconds }}
  # Without metrics the number stays as it is: an outage of Prometheus must not take workers away.
  fallback: {failureThreshold: 4, replicas: {{ .part.autoscaling.minReplicas }}, behavior: currentReplicasIfHigher}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleUp:
          stabilizationWindowSeconds: 30
          policies: [{type: Pods, value: 2, periodSeconds: 60}]
        # One at a time, and the next only when that one has drained.
        scaleDown:
          stabilizationWindowSeconds: {{ .part.autoscaling.scaleDownSeconds }}
          policies: [{type: Pods, value: 1, periodSeconds: {{ include "outrider.grace" .part }}}]
  triggers:
  {{- range $name, $trigger := .triggers }}
    - type: prometheus
      name: {{ $name }}
      metricType: AverageValue
      metadata:
        serverAddress: {{ $.root.Values.autoscaling.prometheusAddress }}
        query: {{ $trigger.query | quote }}
        threshold: {{ $trigger.threshold | quote }}
      {{- with $.root.Values.autoscaling.authenticationRef }}
      authenticationRef: {name: {{ . }}}
      {{- end }}
  {{- end }}
{{- end }}
