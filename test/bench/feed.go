package main

import (
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// step is what the control plane learns at once; a change is one or more.
type step struct{ applied, deleted []metav1.Object }

type change []step

// clock is the time since the machine was started: the same in all processes.
func clock() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(fmt.Sprintf("the monotonic clock: %v", err)) // it has no way to fail
	}
	return time.Duration(t.Nano())
}

// parcel is an object on its way between processes.
type parcel struct {
	Kind   string          `json:"kind"`
	Object json.RawMessage `json:"object"`
}

func pack(list []metav1.Object) ([]parcel, error) {
	var out []parcel
	for _, obj := range list {
		b, err := json.Marshal(obj)
		if err != nil {
			return nil, err
		}
		out = append(out, parcel{fmt.Sprintf("%T", obj), b})
	}
	return out, nil
}

func unpack(list []parcel) ([]metav1.Object, error) {
	var out []metav1.Object
	for _, p := range list {
		var obj metav1.Object
		for _, empty := range []metav1.Object{&corev1.Namespace{}, &corev1.Pod{}, &corev1.Service{}, &discoveryv1.EndpointSlice{}, &networkingv1.NetworkPolicy{}} {
			if fmt.Sprintf("%T", empty) == p.Kind {
				obj = empty
			}
		}
		if obj == nil {
			return nil, fmt.Errorf("an object of kind %s: there is no such thing here", p.Kind)
		}
		if err := json.Unmarshal(p.Object, obj); err != nil {
			return nil, err
		}
		out = append(out, obj)
	}
	return out, nil
}
