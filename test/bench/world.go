package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// Shapes of the cluster.
const (
	shapeSpread = "spread"        // ten namespaces
	shapeOne    = "one-namespace" // one namespace
	shapeLarge  = "large"         // 25,000 namespaces with 4 pods and 3 policies each, of which n pods have sidecars
)

var (
	podNetwork     = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	serviceNetwork = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}
	born           = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
)

// replicas is how many pods a service has.
const replicas = 10

// world is a cluster: each service has ten pods and a policy that admits the pods of the service before it, which are also those that use it.
type world struct {
	objects  map[string]metav1.Object // by key; see keyOf
	services []service
	sidecars []sidecarPod // those that are simulated
	nodes    int
	pods     int // how many were made so far: each has an address of its own
}

type service struct {
	namespace, name string
	addr            netip.Addr
	pods            []string // names
}

// sidecarPod is a pod whose sidecar is simulated.
type sidecarPod struct {
	namespace, name, uid string
	uses                 []string // on-demand names
}

func (p sidecarPod) key() string { return p.namespace + "/" + p.name }

func newWorld(shape string, n int) (*world, error) {
	w := &world{objects: map[string]metav1.Object{}, nodes: max(n/50, 2)}
	switch shape {
	case shapeSpread:
		w.populate(n/replicas, 10)
	case shapeOne:
		w.populate(n/replicas, 1)
	case shapeLarge:
		w.nodes = 500
		w.populateLarge(n)
	default:
		return nil, fmt.Errorf("shape %q: there are %s, %s and %s", shape, shapeSpread, shapeOne, shapeLarge)
	}
	return w, nil
}

func (w *world) populate(services, namespaces int) {
	for i := range namespaces {
		w.put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespaceName(i), Labels: map[string]string{"kubernetes.io/metadata.name": namespaceName(i)}}})
	}
	w.addDNS()
	w.addGuests()
	for i := range services {
		w.addService(namespaceName(i/((services+namespaces-1)/namespaces)), i)
	}
	for i, s := range w.services {
		before := w.services[(i+len(w.services)-1)%len(w.services)]
		w.put(allowFrom(s, "base", before, 8080))
		for _, name := range before.pods {
			p := w.objects["Pod "+before.namespace+"/"+name].(*corev1.Pod)
			w.sidecars = append(w.sidecars, sidecarPod{before.namespace, name, string(p.UID), []string{fmt.Sprintf("od|%s:80", s.addr)}})
		}
	}
}

func namespaceName(i int) string { return "team-" + strconv.Itoa(i) }

// addDNS adds what every cluster has: pods without a sidecar behind a service of UDP.
func (w *world) addDNS() {
	w.put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}})
	s := service{namespace: "kube-system", name: "kube-dns", addr: netip.MustParseAddr("172.16.0.10")}
	w.put(&corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: s.name, CreationTimestamp: metav1.NewTime(born)},
		Spec: corev1.ServiceSpec{ClusterIP: s.addr.String(), ClusterIPs: []string{s.addr.String()}, Ports: []corev1.ServicePort{
			{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53}, {Name: "dns-tcp", Protocol: corev1.ProtocolTCP, Port: 53}}},
	})
	slice := newSlice(s, map[string]corev1.Protocol{"dns": corev1.ProtocolUDP, "dns-tcp": corev1.ProtocolTCP}, 53)
	for range 2 {
		p := w.newPod(s.namespace, s.name, nil)
		w.put(p)
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{p.Status.PodIP}})
	}
	w.put(slice)
}

// addGuests adds a namespace whose labels a policy may speak of.
func (w *world) addGuests() {
	w.put(guests("white"))
	for range 2 {
		w.put(w.newPod("guests", "guest", sidecar))
	}
}

func guests(team string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "guests", Labels: map[string]string{"team": team}}}
}

func (w *world) addService(namespace string, i int) {
	s := service{namespace: namespace, name: "app-" + strconv.Itoa(i), addr: at(netip.MustParseAddr("172.16.1.0"), i)}
	w.put(&corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: s.name, CreationTimestamp: metav1.NewTime(born)},
		Spec:       corev1.ServiceSpec{ClusterIP: s.addr.String(), ClusterIPs: []string{s.addr.String()}, Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}}},
	})
	slice := newSlice(s, map[string]corev1.Protocol{"http": corev1.ProtocolTCP}, 8080)
	for range replicas {
		p := w.newPod(namespace, s.name, sidecar)
		w.put(p)
		s.pods = append(s.pods, p.Name)
		slice.Endpoints = append(slice.Endpoints, endpointOf(p))
	}
	w.put(slice)
	w.services = append(w.services, s)
}

func newSlice(s service, ports map[string]corev1.Protocol, number int32) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: s.namespace, Name: s.name + "-x", Labels: map[string]string{discoveryv1.LabelServiceName: s.name}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for name, proto := range ports {
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &name, Protocol: &proto, Port: &number})
	}
	return slice
}

func endpointOf(p *corev1.Pod) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{Addresses: []string{p.Status.PodIP}, NodeName: &p.Spec.NodeName}
}

// sidecar are the annotations of a pod that has one.
var sidecar = map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}

func (w *world) newPod(namespace, app string, annotations map[string]string) *corev1.Pod {
	i := w.pods
	w.pods++
	node := i % w.nodes
	ip, host := at(netip.MustParseAddr("10.0.0.1"), i).String(), at(netip.MustParseAddr("192.168.0.1"), node).String()
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: fmt.Sprintf("%s-%d", app, i), UID: types.UID("uid-" + strconv.Itoa(i)), CreationTimestamp: metav1.NewTime(born),
			Labels: map[string]string{"app": app, "version": "v1", "pod-template-hash": "5d4f"}, Annotations: annotations,
		},
		Spec: corev1.PodSpec{ServiceAccountName: app, NodeName: "node-" + strconv.Itoa(node),
			Containers: []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}, HostIP: host, HostIPs: []corev1.HostIP{{IP: host}}},
	}
}

// at is the address i after another.
func at(a netip.Addr, i int) netip.Addr {
	b := a.As4()
	n := int(b[0])<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
	n += i
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// allowFrom is a policy that isolates a service and admits the pods of another at a port.
func allowFrom(s service, name string, from service, port int32) *networkingv1.NetworkPolicy {
	tcp, number := corev1.ProtocolTCP, intstr.FromInt32(port)
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name + "-" + s.name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": s.name}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{
				Ports: []networkingv1.NetworkPolicyPort{{Protocol: &tcp, Port: &number}},
				From: []networkingv1.NetworkPolicyPeer{{
					NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": from.namespace}},
					PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"app": from.name}},
				}},
			}},
		},
	}
}

func keyOf(obj metav1.Object) string {
	kind := ""
	switch obj.(type) {
	case *corev1.Namespace:
		kind = "Namespace"
	case *corev1.Pod:
		kind = "Pod"
	case *corev1.Service:
		kind = "Service"
	case *discoveryv1.EndpointSlice:
		kind = "EndpointSlice"
	case *networkingv1.NetworkPolicy:
		kind = "NetworkPolicy"
	}
	return kind + " " + obj.GetNamespace() + "/" + obj.GetName()
}

func (w *world) put(obj metav1.Object) { w.objects[keyOf(obj)] = obj }

// take makes a change here, too.
func (w *world) take(c change) {
	for _, s := range c {
		for _, obj := range s.deleted {
			delete(w.objects, keyOf(obj))
		}
		for _, obj := range s.applied {
			w.put(obj)
		}
	}
}

// all lists the objects, in the same order every time.
func (w *world) all() *policy.Objects {
	keys := make([]string, 0, len(w.objects))
	for k := range w.objects {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	o := &policy.Objects{}
	for _, k := range keys {
		switch obj := w.objects[k].(type) {
		case *corev1.Namespace:
			o.Namespaces = append(o.Namespaces, obj)
		case *corev1.Pod:
			o.Pods = append(o.Pods, obj)
		case *corev1.Service:
			o.Services = append(o.Services, obj)
		case *discoveryv1.EndpointSlice:
			o.EndpointSlices = append(o.EndpointSlices, obj)
		case *networkingv1.NetworkPolicy:
			o.NetworkPolicies = append(o.NetworkPolicies, obj)
		}
	}
	return o
}
