{{- define "mantlet.labels" -}}
app.kubernetes.io/name: mantlet
app.kubernetes.io/part-of: mantlet
{{- end }}

{{- define "mantlet.controlplane" -}}
app.kubernetes.io/name: mantlet
app.kubernetes.io/component: control-plane
{{- end }}

{{- /* The configuration file of the control plane, see controlplane/settings. */}}
{{- define "mantlet.settings" -}}
namespace: {{ .Release.Namespace }}
trustDomain: {{ .Values.trustDomain | quote }}
mtls: {{ .Values.mtls }}
podNetworks: {{ toJson .Values.podNetworks }}
serviceNetworks: {{ toJson .Values.serviceNetworks }}
nodeAddresses: {{ toJson .Values.nodeAddresses }}
nodePorts: {{ .Values.nodePorts | quote }}
systemNamespaces: {{ toJson .Values.systemNamespaces }}
injectByDefault: {{ .Values.injectByDefault }}
capture: {{ .Values.capture }}
podSecurity: {{ .Values.podSecurity | quote }}
image: {{ required "image is required: registry.example/mantlet@sha256:…" .Values.image | quote }}
imagePullPolicy: {{ .Values.imagePullPolicy }}
sidecar:
{{ toYaml .Values.sidecar | indent 2 }}
{{- end }}

{{- /* Namespaces in which nothing waits for Mantlet, so that a cluster that has lost all of it can start it again. */}}
{{- define "mantlet.excluded" -}}
- key: kubernetes.io/metadata.name
  operator: NotIn
  values:
  - kube-system
  - {{ .Release.Namespace }}
  {{- range .Values.systemNamespaces }}
  - {{ . }}
  {{- end }}
{{- end }}

{{- /* Namespaces whose pods get sidecars. */}}
{{- define "mantlet.injected" -}}
- key: mantlet.dev/inject
  {{- if .Values.injectByDefault }}
  operator: NotIn
  values: [disabled]
  {{- else }}
  operator: In
  values: [enabled, required]
  {{- end }}
{{ include "mantlet.excluded" . }}
{{- end }}

{{- /* Namespaces whose pods get sidecars where they ask for one: all others but those in which Mantlet could wait for itself. */}}
{{- define "mantlet.others" -}}
- key: mantlet.dev/inject
  {{- if .Values.injectByDefault }}
  operator: In
  values: [disabled]
  {{- else }}
  operator: NotIn
  values: [enabled, required]
  {{- end }}
{{ include "mantlet.excluded" . }}
{{- end }}

{{- define "mantlet.client" -}}
service:
  namespace: {{ .Release.Namespace }}
  name: mantlet
  port: 443
{{- end }}

{{- /* What the webhooks never see: pods of the node's network and static pods, to which no policy applies. */}}
{{- define "mantlet.conditions" -}}
- name: not-host-network
  expression: "!(has(object.spec.hostNetwork) && object.spec.hostNetwork)"
- name: not-static
  expression: "!(has(object.metadata.annotations) && 'kubernetes.io/config.mirror' in object.metadata.annotations)"
{{- end }}

{{- /* What the control plane takes for a sidecar, and gives the pod's identity: so a pod that has it is looked at wherever it is, opted out or not. */}}
{{- define "mantlet.named" -}}
has(object.spec.initContainers) && object.spec.initContainers.exists(c, c.name == 'mantlet-proxy')
{{- end }}

{{- define "mantlet.wanted" -}}
- name: not-opted-out
  expression: "!(has(object.metadata.annotations) && 'mantlet.dev/inject' in object.metadata.annotations && object.metadata.annotations['mantlet.dev/inject'] == 'false') || ({{ include "mantlet.named" . }})"
{{- end }}

{{- define "mantlet.optedIn" -}}
- name: opted-in
  expression: "(has(object.metadata.annotations) && 'mantlet.dev/inject' in object.metadata.annotations && object.metadata.annotations['mantlet.dev/inject'] != 'false') || ({{ include "mantlet.named" . }})"
{{- end }}

{{- define "mantlet.pods" -}}
- apiGroups: [""]
  apiVersions: [v1]
  operations: [CREATE]
  resources: [pods]
  scope: Namespaced
{{- end }}
