package source

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
)

func finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// leaveOut takes the pods out that no policy applies to.
func (r *reader) leaveOut() {
	var host, over []string
	r.pods = slices.DeleteFunc(r.pods, func(p *corev1.Pod) bool {
		key := p.Namespace + "/" + p.Name
		switch {
		case finished(p):
			over = append(over, key)
		case p.Spec.HostNetwork:
			host = append(host, key)
		default:
			return false
		}
		r.leftOut[key] = true
		return true
	})
	if len(host) > 0 {
		r.warn("left out, because no policy applies to pods with hostNetwork: %s", some(host))
	}
	if len(over) > 0 {
		r.warn("left out, because they have finished: %s", some(over))
	}
}

// makeNamespaces makes the namespaces that are mentioned and not declared, and labels all with their names, as the API server does.
func (r *reader) makeNamespaces() {
	declared := map[string]bool{}
	for _, ns := range r.namespaces {
		declared[ns.Name] = true
	}
	mention := func(o metav1.Object) {
		if name := o.GetNamespace(); name != "" && !declared[name] {
			declared[name] = true
			r.namespaces = append(r.namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
		}
	}
	for o := range r.origin {
		mention(o)
	}
	for _, ns := range r.namespaces {
		if ns.Labels == nil {
			ns.Labels = map[string]string{}
		}
		ns.Labels[corev1.LabelMetadataName] = ns.Name
		ns.Status.Phase = corev1.NamespaceActive
	}
	sortObjects(r.namespaces)
}

// runPods fills in what the API server, the scheduler and the kubelet would. Whether a pod runs and is ready is taken from the
// manifest if it says so.
func (r *reader) runPods() {
	for _, p := range r.pods {
		if p.Spec.ServiceAccountName == "" {
			p.Spec.ServiceAccountName = "default"
		}
		for _, cs := range [][]corev1.Container{p.Spec.Containers, p.Spec.InitContainers} {
			for i := range cs {
				for j := range cs[i].Ports {
					cs[i].Ports[j].Protocol = protocolOr(cs[i].Ports[j].Protocol)
				}
			}
		}
		p.Spec.NodeName = cmp.Or(p.Spec.NodeName, defaultNode)
		p.Status.HostIP, p.Status.HostIPs = nodeIPs[0].String(), nil
		for _, a := range nodeIPs {
			p.Status.HostIPs = append(p.Status.HostIPs, corev1.HostIP{IP: a.String()})
		}
		if p.Status.Phase == "" {
			p.Status.Phase = corev1.PodRunning
		}
		if _, said := readiness(p); !said {
			status := corev1.ConditionTrue
			if p.Status.Phase != corev1.PodRunning {
				status = corev1.ConditionFalse
			}
			p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: status})
		}
	}
}

// readiness is whether a pod is ready, and whether it says so at all.
func readiness(p *corev1.Pod) (ready, said bool) {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue, true
		}
	}
	return false, false
}

// inject marks the pods that get a sidecar, and unmarks the others.
func (r *reader) inject() {
	labeled, required := map[string]bool{}, map[string]bool{}
	for _, ns := range r.namespaces {
		switch v, ok := ns.Labels[policy.InjectLabel]; {
		case v == "enabled":
			labeled[ns.Name] = true
		case v == names.InjectRequired:
			labeled[ns.Name], required[ns.Name] = true, true
		case ok && v != "disabled":
			r.warn("namespace %s: label %s: %s has no effect; the values that give sidecars are enabled and %s", ns.Name, policy.InjectLabel, v, names.InjectRequired)
		}
	}
	var out []string
	injected := 0
	for _, p := range r.pods {
		in := r.o.Inject == InjectAll || labeled[p.Namespace]
		switch p.Annotations[policy.InjectLabel] {
		case "true":
			in = true
		case "false":
			in = false
			if required[p.Namespace] {
				out = append(out, p.Namespace+"/"+p.Name)
			}
		}
		if !in {
			delete(p.Annotations, policy.SidecarAnnotation)
			continue
		}
		injected++
		if p.Annotations == nil {
			p.Annotations = map[string]string{}
		}
		p.Annotations[policy.SidecarAnnotation] = policy.SidecarInjected
	}
	if len(out) > 0 { // those of a cluster that were there before the label are such pods, and run
		r.warn("they opt out in namespaces with the label %s: %s, which refuse such pods when they are made; here they count as pods without sidecar: %s",
			policy.InjectLabel, names.InjectRequired, some(out))
	}
	if injected == 0 && len(r.pods) > 0 {
		r.warn("no pod gets a sidecar, so no policy is enforced: label namespaces %s: enabled, or use --inject-all", policy.InjectLabel)
	}
}

// podIPs are the addresses that a manifest gives a pod.
func podIPs(p *corev1.Pod) []string {
	var ips []string
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	if len(ips) == 0 && p.Status.PodIP != "" {
		ips = []string{p.Status.PodIP}
	}
	return ips
}

func podIPField(p *corev1.Pod) string {
	if len(p.Status.PodIPs) == 0 {
		return "status.podIP"
	}
	return "status.podIPs"
}

func protocolOr(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}
