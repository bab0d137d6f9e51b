{{- define "rheostat.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "rheostat.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "rheostat.labels" -}}
{{ include "rheostat.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "rheostat.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "rheostat.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* Seconds of draining: of the configuration, which must be TOML; of a Secret's the chart cannot know. */ -}}
{{- define "rheostat.drainSeconds" -}}
{{- if .Values.configSecret -}}
{{- .Values.drainSeconds -}}
{{- else -}}
{{- $config := fromToml .Values.config -}}
{{- if hasKey $config "Error" }}{{ fail (printf "config is not TOML: %s" $config.Error) }}{{ end -}}
{{- dig "server" "drain_seconds" 30 $config -}}
{{- end -}}
{{- end -}}
