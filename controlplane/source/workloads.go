package source

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// workload is anything that makes pods of a template.
type workload struct {
	meta         metav1.Object
	apiVersion   string
	kind         string
	rank         int // of two workloads of one name, the lower one keeps the plain pod names
	template     corev1.PodTemplateSpec
	templatePath *field.Path
	selects      bool // has a selector, which must match the template
	selector     *metav1.LabelSelector
	replicas     *int32 // as written; nil: not, or the kind has none
	replicasPath *field.Path
	suspended    bool
	scales       bool // Options.Replicas applies
	start        int  // the first ordinal
	// mark adds what the kind's controller adds to the labels and the spec of the pod with an ordinal.
	mark func(w *workload, pod *corev1.Pod, ordinal int)
}

func deployment(o *appsv1.Deployment) *workload {
	return &workload{meta: o, apiVersion: "apps/v1", kind: "Deployment", rank: 1, template: o.Spec.Template, templatePath: field.NewPath("spec", "template"),
		selects: true, selector: o.Spec.Selector, replicas: o.Spec.Replicas, replicasPath: field.NewPath("spec", "replicas"), scales: true,
		mark: func(w *workload, pod *corev1.Pod, _ int) {
			pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = w.hash()
		}}
}

func replicaSet(o *appsv1.ReplicaSet) *workload {
	return &workload{meta: o, apiVersion: "apps/v1", kind: "ReplicaSet", rank: 3, template: o.Spec.Template, templatePath: field.NewPath("spec", "template"),
		selects: true, selector: o.Spec.Selector, replicas: o.Spec.Replicas, replicasPath: field.NewPath("spec", "replicas"), scales: true,
		mark: func(*workload, *corev1.Pod, int) {}}
}

func statefulSet(o *appsv1.StatefulSet) *workload {
	start := 0
	if o.Spec.Ordinals != nil {
		start = max(0, int(o.Spec.Ordinals.Start))
	}
	return &workload{meta: o, apiVersion: "apps/v1", kind: "StatefulSet", rank: 0, template: o.Spec.Template, templatePath: field.NewPath("spec", "template"),
		selects: true, selector: o.Spec.Selector, replicas: o.Spec.Replicas, replicasPath: field.NewPath("spec", "replicas"), scales: true, start: start,
		mark: func(w *workload, pod *corev1.Pod, ordinal int) {
			pod.Labels[appsv1.StatefulSetPodNameLabel] = pod.Name
			pod.Labels[appsv1.PodIndexLabel] = strconv.Itoa(ordinal)
			pod.Labels[appsv1.ControllerRevisionHashLabelKey] = o.Name + "-" + w.hash()
			pod.Spec.Hostname, pod.Spec.Subdomain = pod.Name, o.Spec.ServiceName
		}}
}

func daemonSet(o *appsv1.DaemonSet) *workload {
	return &workload{meta: o, apiVersion: "apps/v1", kind: "DaemonSet", rank: 2, template: o.Spec.Template, templatePath: field.NewPath("spec", "template"),
		selects: true, selector: o.Spec.Selector,
		mark: func(w *workload, pod *corev1.Pod, _ int) {
			pod.Labels[appsv1.ControllerRevisionHashLabelKey] = w.hash()
			pod.Labels["pod-template-generation"] = "1"
		}}
}

func job(o *batchv1.Job) *workload {
	return &workload{meta: o, apiVersion: "batch/v1", kind: "Job", rank: 4, template: o.Spec.Template, templatePath: field.NewPath("spec", "template"),
		replicas: o.Spec.Parallelism, replicasPath: field.NewPath("spec", "parallelism"), suspended: o.Spec.Suspend != nil && *o.Spec.Suspend,
		mark: func(w *workload, pod *corev1.Pod, ordinal int) {
			markJob(pod, o.Name, w.uid(), &o.Spec, ordinal)
		}}
}

func cronJob(o *batchv1.CronJob) *workload {
	w := &workload{meta: o, apiVersion: "batch/v1", kind: "CronJob", rank: 5, template: o.Spec.JobTemplate.Spec.Template,
		templatePath: field.NewPath("spec", "jobTemplate", "spec", "template"),
		replicas:     o.Spec.JobTemplate.Spec.Parallelism, replicasPath: field.NewPath("spec", "jobTemplate", "spec", "parallelism"),
		suspended: o.Spec.Suspend != nil && *o.Spec.Suspend}
	w.mark = func(w *workload, pod *corev1.Pod, ordinal int) {
		// The controller names a Job after the minute for which it is scheduled; any minute will do.
		markJob(pod, o.Name+"-29000000", w.uid(), &o.Spec.JobTemplate.Spec, ordinal)
	}
	return w
}

func markJob(pod *corev1.Pod, name string, uid types.UID, spec *batchv1.JobSpec, ordinal int) {
	for _, prefix := range []string{"", "batch.kubernetes.io/"} {
		pod.Labels[prefix+"job-name"] = name
		pod.Labels[prefix+"controller-uid"] = string(uid)
	}
	if spec.CompletionMode != nil && *spec.CompletionMode == batchv1.IndexedCompletion {
		pod.Labels[batchv1.JobCompletionIndexAnnotation] = strconv.Itoa(ordinal)
		pod.Annotations[batchv1.JobCompletionIndexAnnotation] = strconv.Itoa(ordinal)
	}
}

// hash is what a controller would compute of the template: 10 characters that differ when it differs.
func (w *workload) hash() string {
	b, err := json.Marshal(w.template)
	if err != nil { // it came from JSON
		panic(fmt.Sprintf("source: marshal pod template of %s: %v", w, err))
	}
	return safeHash(b, 10)
}

// safeHash writes a hash with the letters that Kubernetes draws for names: no vowels, no words.
func safeHash(b []byte, letters int) string {
	const alphabet = "bcdfghjklmnpqrstvwxz2456789"
	sum := sha256.Sum256(b)
	out := make([]byte, letters)
	for i := range out {
		out[i] = alphabet[int(sum[i])%len(alphabet)]
	}
	return string(out)
}

// uid is the workload's, or one computed of what it is called.
func (w *workload) uid() types.UID {
	if u := w.meta.GetUID(); u != "" {
		return u
	}
	s := sha256.Sum256([]byte(w.String()))
	return types.UID(fmt.Sprintf("%x-%x-%x-%x-%x", s[:4], s[4:6], s[6:8], s[8:10], s[10:16]))
}

// String is "Kind namespace/name".
func (w *workload) String() string {
	return w.kind + " " + w.meta.GetNamespace() + "/" + w.meta.GetName()
}

func selectsLabels(s *metav1.LabelSelector, set map[string]string) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(labels.Set(set))
}

// makePods makes the pods of the workloads that have none in the input.
func (r *reader) makePods() {
	owned := r.owned()
	taken := map[string]metav1.Object{} // "namespace/name" of a pod → what it comes from
	for _, p := range r.pods {
		taken[p.Namespace+"/"+p.Name] = p
	}
	plain := map[string]bool{} // "namespace/name" of a workload that gave its name to pods
	var stopped []string
	for _, w := range r.workloads {
		if owned[w.String()] {
			continue
		}
		n := 1
		if w.scales {
			n = r.o.Replicas
		}
		if w.suspended || w.replicas != nil && *w.replicas == 0 {
			stopped = append(stopped, w.String())
			n = 0
		}
		base := w.meta.GetName()
		if key := w.meta.GetNamespace() + "/" + base; plain[key] {
			base += "-" + strings.ToLower(w.kind)
		} else {
			plain[key] = true
		}
		for i := range n {
			pod := w.pod(fmt.Sprintf("%s-%d", base, w.start+i), i)
			key := pod.Namespace + "/" + pod.Name
			if other, ok := taken[key]; ok {
				it := r.origin[other]
				r.wrong(w.meta, "metadata.name", fmt.Sprintf("its pod would be %s, and so is that of %s at %s", key, it.object(), it.place()), "rename one of the two")
				continue
			}
			taken[key] = w.meta
			r.origin[pod] = r.origin[w.meta]
			r.pods = append(r.pods, pod)
		}
	}
	if len(stopped) > 0 {
		r.warn("no pods for what is scaled to zero or suspended: %s", some(stopped))
	}
	sortObjects(r.pods)
}

// pod makes the pod with an ordinal, as the workload's controller would.
func (w *workload) pod(name string, i int) *corev1.Pod {
	t := w.template.DeepCopy()
	yes := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: w.meta.GetNamespace(), Name: name, Labels: t.Labels, Annotations: t.Annotations,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: w.apiVersion, Kind: w.kind, Name: w.meta.GetName(), UID: w.uid(), Controller: &yes}},
		},
		Spec: t.Spec,
	}
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	w.mark(w, pod, w.start+i)
	return pod
}

var scheduledJob = regexp.MustCompile(`^(.+)-\d+$`)

// owned says of which workloads no pods are to be made: those whose pods are in the input, and those that another workload in the
// input stands for. Keys are as [workload.String] writes them.
func (r *reader) owned() map[string]bool {
	exists := map[string]*workload{}
	for _, w := range r.workloads {
		exists[w.String()] = w
	}
	owned := map[string]bool{}
	key := func(kind, namespace, name string) string { return kind + " " + namespace + "/" + name }
	for _, p := range r.pods {
		for _, ref := range p.OwnerReferences {
			if group, _, _ := strings.Cut(ref.APIVersion, "/"); group != "apps" && group != "batch" {
				continue
			}
			k := key(ref.Kind, p.Namespace, ref.Name)
			owned[k] = true
			if exists[k] != nil {
				continue
			}
			// The one in between is not in the input: its name says whose it is.
			switch ref.Kind {
			case "ReplicaSet":
				if name, ok := strings.CutSuffix(ref.Name, "-"+p.Labels[appsv1.DefaultDeploymentUniqueLabelKey]); ok {
					owned[key("Deployment", p.Namespace, name)] = true
				}
			case "Job":
				if m := scheduledJob.FindStringSubmatch(ref.Name); m != nil {
					owned[key("CronJob", p.Namespace, m[1])] = true
				}
			}
		}
	}
	above := map[string]bool{}
	for k, w := range exists {
		for _, ref := range w.meta.GetOwnerReferences() {
			owner := key(ref.Kind, w.meta.GetNamespace(), ref.Name)
			if exists[owner] == nil {
				continue
			}
			if owned[k] {
				above[owner] = true
			}
			above[k] = true
		}
	}
	maps.Copy(owned, above)
	return owned
}
