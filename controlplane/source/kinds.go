package source

import (
	"cmp"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// objects are what was read, by kind. Workloads of all kinds are in one list.
type objects struct {
	namespaces []*corev1.Namespace
	nodes      []*corev1.Node
	pods       []*corev1.Pod
	workloads  []*workload
	services   []*corev1.Service
	slices     []*discoveryv1.EndpointSlice
	accounts   []*corev1.ServiceAccount // nothing is made of them; they are checked
	policies   []*networkingv1.NetworkPolicy
}

// sort puts every list in order of namespace and name, so that nothing depends on the order of files.
func (o *objects) sort() {
	sortObjects(o.namespaces)
	sortObjects(o.nodes)
	sortObjects(o.pods)
	sortObjects(o.services)
	sortObjects(o.slices)
	sortObjects(o.policies)
	slices.SortStableFunc(o.workloads, func(a, b *workload) int {
		return cmp.Or(strings.Compare(a.meta.GetNamespace(), b.meta.GetNamespace()), strings.Compare(a.meta.GetName(), b.meta.GetName()), a.rank-b.rank)
	})
}

func sortObjects[O metav1.Object](list []O) {
	slices.SortStableFunc(list, func(a, b O) int {
		return cmp.Or(strings.Compare(a.GetNamespace(), b.GetNamespace()), strings.Compare(a.GetName(), b.GetName()))
	})
}

// kind is how objects of one kind are read.
type kind struct {
	apiVersion    string
	clusterScoped bool
	validName     validation.ValidateNameFunc
	// read decodes an item, hands the object to check and keeps it if that finds nothing wrong with it.
	read func(r *reader, it *item, k kind)
}

// kinds are the kinds that are read.
var kinds = map[string]kind{
	"Namespace": {apiVersion: "v1", clusterScoped: true, validName: validation.ValidateNamespaceName,
		read: reads(checkNamespace, func(r *reader, o *corev1.Namespace) { r.namespaces = append(r.namespaces, o) })},
	"Node": {apiVersion: "v1", clusterScoped: true, validName: validation.NameIsDNSSubdomain,
		read: reads(nil, func(r *reader, o *corev1.Node) { r.nodes = append(r.nodes, o) })},
	"Pod": {apiVersion: "v1", validName: validation.NameIsDNSSubdomain,
		read: reads(checkPod, func(r *reader, o *corev1.Pod) { r.pods = append(r.pods, o) })},
	"Service": {apiVersion: "v1", validName: validation.NameIsDNSLabel,
		read: reads(checkService, func(r *reader, o *corev1.Service) { r.services = append(r.services, o) })},
	"ServiceAccount": {apiVersion: "v1", validName: validation.ValidateServiceAccountName,
		read: reads(nil, func(r *reader, o *corev1.ServiceAccount) { r.accounts = append(r.accounts, o) })},
	"EndpointSlice": {apiVersion: "discovery.k8s.io/v1", validName: validation.NameIsDNSSubdomain,
		read: reads(checkSlice, func(r *reader, o *discoveryv1.EndpointSlice) { r.slices = append(r.slices, o) })},
	"NetworkPolicy": {apiVersion: "networking.k8s.io/v1", validName: validation.NameIsDNSSubdomain,
		read: reads(checkPolicy, func(r *reader, o *networkingv1.NetworkPolicy) { r.policies = append(r.policies, o) })},
	"Deployment": {apiVersion: "apps/v1", validName: validation.NameIsDNSSubdomain,
		read: reads(func(o *appsv1.Deployment) field.ErrorList { return checkWorkload(deployment(o)) },
			func(r *reader, o *appsv1.Deployment) { r.workloads = append(r.workloads, deployment(o)) })},
	"ReplicaSet": {apiVersion: "apps/v1", validName: validation.NameIsDNSSubdomain,
		read: reads(func(o *appsv1.ReplicaSet) field.ErrorList { return checkWorkload(replicaSet(o)) },
			func(r *reader, o *appsv1.ReplicaSet) { r.workloads = append(r.workloads, replicaSet(o)) })},
	"StatefulSet": {apiVersion: "apps/v1", validName: validation.NameIsDNSLabel,
		read: reads(func(o *appsv1.StatefulSet) field.ErrorList { return checkWorkload(statefulSet(o)) },
			func(r *reader, o *appsv1.StatefulSet) { r.workloads = append(r.workloads, statefulSet(o)) })},
	"DaemonSet": {apiVersion: "apps/v1", validName: validation.NameIsDNSSubdomain,
		read: reads(func(o *appsv1.DaemonSet) field.ErrorList { return checkWorkload(daemonSet(o)) },
			func(r *reader, o *appsv1.DaemonSet) { r.workloads = append(r.workloads, daemonSet(o)) })},
	"Job": {apiVersion: "batch/v1", validName: validation.NameIsDNSLabel, // its name becomes a label value
		read: reads(func(o *batchv1.Job) field.ErrorList { return checkWorkload(job(o)) },
			func(r *reader, o *batchv1.Job) { r.workloads = append(r.workloads, job(o)) })},
	"CronJob": {apiVersion: "batch/v1", validName: validCronJobName,
		read: reads(func(o *batchv1.CronJob) field.ErrorList { return checkWorkload(cronJob(o)) },
			func(r *reader, o *batchv1.CronJob) { r.workloads = append(r.workloads, cronJob(o)) })},
}

// validCronJobName leaves room for the 11 characters that the names of its Jobs add.
func validCronJobName(name string, prefix bool) []string {
	errs := validation.NameIsDNSSubdomain(name, prefix)
	if len(name) > 52 {
		errs = append(errs, "must be no more than 52 characters")
	}
	return errs
}

// deciding are kinds that are not enforced although they decide who may talk to whom, with what their group ends in. Those of
// Antrea and Calico share names with sig-network's.
var deciding = map[string]string{
	"AdminNetworkPolicy": "", "BaselineAdminNetworkPolicy": "", "ClusterNetworkPolicy": "",
	"NetworkPolicy": "", "GlobalNetworkPolicy": "", "StagedNetworkPolicy": "", // of other groups than ours
	"CiliumNetworkPolicy": "", "CiliumClusterwideNetworkPolicy": "",
	"AuthorizationPolicy": "", "PeerAuthentication": ".istio.io", "Sidecar": ".istio.io",
	"Server": ".linkerd.io", "ServerAuthorization": ".linkerd.io",
}

// noteKinds warns of what was ignored and decides connectivity.
func (r *reader) noteKinds() {
	var lines []string
	for name, n := range r.ignored {
		apiVersion, k := cutLast(name, "/")
		group, _, _ := strings.Cut(apiVersion, "/")
		if of, ok := deciding[k]; ok && strings.HasSuffix("."+group, of) {
			lines = append(lines, name+" ("+count(n, "object")+") decides about connections too, and is not enforced")
		}
		if name == "v1/Endpoints" {
			lines = append(lines, name+" ("+count(n, "object")+") is not read; for a Service without selector write an EndpointSlice")
		}
	}
	for what, n := range r.unknown {
		lines = append(lines, what+" ("+count(n, "object")+") is not known to this version, and has no effect")
	}
	slices.Sort(lines)
	r.warnings = append(r.warnings, lines...)
}

func cutLast(s, sep string) (before, after string) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", s
	}
	return s[:i], s[i+len(sep):]
}
